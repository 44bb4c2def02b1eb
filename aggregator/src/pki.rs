//! The federation's public-key infrastructure: a CA in one folder, and kits, one folder per member, that
//! are complete to be copied to where they are used.
//!
//! ```text
//! pki/pki.toml              the federation's name, and where its aggregator listens
//! pki/ca/ca.key             the CA's key, 0600: stays on the machine where certificates are issued
//! pki/ca/ca.pem             the CA's certificate
//! pki/issued/*.pem          every certificate ever issued (kits are moved away)
//! pki/kits/site-paris/      key.pem (0600), cert.pem, ca.pem, client.toml
//! ```
//!
//! The CA's key never goes into a kit, and a private key is never readable by others, not even while it is
//! being written.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

use consort_common::{
    identity::{Federation, Identity, IdentityError, Role, Validity},
    ids::SiteName,
    tls::{CredentialFiles, Credentials, CredentialsError, ServerAddress},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

/// Days that a CA's certificate is valid, unless told otherwise.
pub const CA_DAYS: u32 = 3650;
/// Days that a member's certificate is valid, unless told otherwise.
pub const KIT_DAYS: u32 = 825;
/// The port that aggregators listen on, unless told otherwise.
pub const PORT: u16 = 7443;

/// Certificates are valid from this much before they are made: clocks differ.
const CLOCK_SKEW: Duration = Duration::HOUR;

const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// Why a CA or a kit was not made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Something is there already.
    #[error("{what} exists already at {path}; {advice}", path = path.display())]
    Exists {
        /// What would have been overwritten.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// There is no CA.
    #[error("there is no federation CA in {path}: make one with `consort pki init --federation NAME`, or name its folder with --directory", path = .0.display())]
    NoCa(PathBuf),
    /// The CA's files do not fit each other.
    #[error("the federation CA in {path} is damaged: {reason}; restore the folder from a backup", path = path.display())]
    DamagedCa {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Nobody knows where the aggregator listens.
    #[error(
        "the aggregator's address is not known yet: issue the aggregator's kit first, or pass --endpoint HOST:PORT"
    )]
    NoEndpoint,
    /// Not a host.
    #[error(
        "{0:?} is neither a host name nor an IP address; write it without scheme and port, as in aggregator.example.org"
    )]
    Host(String),
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// "read", "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A certificate on record cannot be understood.
    #[error("{path} is not a certificate of a federation's member: {source}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// The cryptography failed.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The kit that was written cannot be used.
    #[error("the kit that was just written cannot be used: {0}")]
    Kit(#[from] CredentialsError),
}

/// A host name or address in an aggregator's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host(SanType);

impl FromStr for Host {
    type Err = PkiError;
    fn from_str(text: &str) -> Result<Self, PkiError> {
        let error = || PkiError::Host(text.chars().take(160).collect());
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self(SanType::IpAddress(address)));
        }
        match ServerName::try_from(text) {
            Ok(ServerName::DnsName(_)) => Ok(Self(SanType::DnsName(text.try_into().map_err(|_| error())?))),
            _ => Err(error()),
        }
    }
}

impl Host {
    /// This machine, as seen from itself and, by its name, from its network.
    pub fn this_machine() -> Vec<Self> {
        let mut hosts = vec![
            Self(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST))),
            Self(SanType::IpAddress(IpAddr::V6(Ipv6Addr::LOCALHOST))),
        ];
        let names = ["localhost".to_owned()].into_iter().chain(sysinfo::System::host_name());
        for host in names.filter_map(|name| name.parse().ok()) {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
        hosts
    }

    /// As one writes it in an endpoint.
    fn to_text(&self) -> String {
        match &self.0 {
            SanType::IpAddress(IpAddr::V6(address)) => format!("[{address}]"),
            SanType::IpAddress(address) => address.to_string(),
            SanType::DnsName(name) => name.as_str().to_owned(),
            other => format!("{other:?}"),
        }
    }
}

/// What `pki.toml` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    federation: Federation,
    /// Where the aggregator issued last listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<ServerAddress>,
}

/// A federation's CA, able to issue.
pub struct Authority {
    directory: PathBuf,
    state: State,
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    not_after: OffsetDateTime,
}

/// What a kit shall be.
#[derive(Debug, Clone)]
pub struct KitOrder {
    /// What the member is.
    pub role: Role,
    /// Its name.
    pub name: SiteName,
    /// For an aggregator: where it is reached. Empty: [`Host::this_machine`].
    pub hosts: Vec<Host>,
    /// Where the aggregator listens. Without it: an aggregator's first host (localhost if none was named);
    /// for others, what the aggregator's kit said.
    pub endpoint: Option<ServerAddress>,
    /// The certificate's end. May lie in the past, for tests; is cut to that of the CA.
    pub not_after: OffsetDateTime,
    /// The kit's folder; without it, `kits/<role>-<name>`.
    pub folder: Option<PathBuf>,
    /// Replace files that exist.
    pub force: bool,
}

impl KitOrder {
    /// A kit with the usual settings.
    pub fn new(role: Role, name: SiteName) -> Self {
        Self {
            role,
            name,
            hosts: Vec::new(),
            endpoint: None,
            not_after: days_from_now(KIT_DAYS),
            folder: None,
            force: false,
        }
    }
}

/// A kit that was written.
#[derive(Debug, Clone)]
pub struct Kit {
    /// Who holds it.
    pub identity: Identity,
    /// Its folder.
    pub folder: PathBuf,
    /// The configuration in it.
    pub config: PathBuf,
    /// The credentials in it.
    pub files: CredentialFiles,
    /// Where the member finds (or is) the aggregator.
    pub endpoint: ServerAddress,
    /// Hosts in the certificate.
    pub hosts: Vec<String>,
    /// The certificate's end.
    pub not_after: OffsetDateTime,
}

/// A certificate on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Who it is for.
    pub identity: Identity,
    /// When it may be used.
    pub validity: Validity,
    /// Its file.
    pub file: PathBuf,
}

/// A date for a certificate's end.
pub fn days_from_now(days: u32) -> OffsetDateTime {
    OffsetDateTime::now_utc() + Duration::days(i64::from(days))
}

impl Authority {
    /// Makes a federation's CA in `directory`.
    ///
    /// # Errors
    /// If one is there already, unless `force`: the old one is then kept beside it, under another name.
    pub fn init(
        directory: &Path,
        federation: &Federation,
        not_after: OffsetDateTime,
        force: bool,
    ) -> Result<Self, PkiError> {
        let folder = directory.join("ca");
        if folder.exists() {
            if !force {
                return Err(PkiError::Exists {
                    what: "a federation CA",
                    path: folder,
                    advice: "kits are issued with `consort pki issue`; --force sets the CA aside and makes a new one, which makes every kit useless",
                });
            }
            let aside = directory.join(format!("ca.replaced-{}", OffsetDateTime::now_utc().unix_timestamp()));
            fs::rename(&folder, &aside).map_err(file_error("rename", &folder))?;
        }

        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("Consort CA of {federation}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(random_serial_number());
        set_validity(&mut params, not_after);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;

        make_folder(&folder, 0o700)?;
        write_file(&folder.join("ca.key"), &key.serialize_pem(), SECRET)?;
        write_file(&folder.join("ca.pem"), &certificate.pem(), PUBLIC)?;
        write_state(directory, &State { federation: federation.clone(), endpoint: None })?;
        Self::open(directory)
    }

    /// The CA in `directory`.
    ///
    /// # Errors
    /// If there is none, or its files do not fit each other.
    pub fn open(directory: &Path) -> Result<Self, PkiError> {
        let folder = directory.join("ca");
        let damaged = |reason: String| PkiError::DamagedCa { path: directory.to_owned(), reason };
        let read = |path: PathBuf| match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(PkiError::NoCa(directory.to_owned()))
            }
            outcome => outcome.map_err(file_error("read", &path)),
        };
        let state = toml::from_str(&read(directory.join("pki.toml"))?)
            .map_err(|error| damaged(format!("pki.toml: {error}")))?;
        let ca_pem = read(folder.join("ca.pem"))?;
        let key_pem = read(folder.join("ca.key"))?;

        let certificate = CertificateDer::from_pem_slice(ca_pem.as_bytes())
            .map_err(|error| damaged(format!("ca.pem: {error}")))?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| damaged(format!("ca.key: {error}")))?;
        // rcgen would sign with any key.
        CertifiedKey::from_der(
            vec![certificate.clone()],
            key,
            &rustls::crypto::aws_lc_rs::default_provider(),
        )
        .map_err(|error| damaged(format!("ca.key does not belong to ca.pem ({error})")))?;
        let validity =
            Validity::of_certificate(&certificate).map_err(|error| damaged(format!("ca.pem: {error}")))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::from_pem(&key_pem)?)?;
        Ok(Self {
            directory: directory.to_owned(),
            state,
            issuer,
            ca_pem,
            not_after: validity.not_after.into(),
        })
    }

    /// The federation's name.
    pub fn federation(&self) -> &Federation {
        &self.state.federation
    }

    /// Issues a certificate and writes the member's kit.
    ///
    /// # Errors
    /// If a kit is in the folder already, unless the order says to replace it.
    pub fn issue(&mut self, order: &KitOrder) -> Result<Kit, PkiError> {
        let folder = order
            .folder
            .clone()
            .unwrap_or_else(|| self.directory.join("kits").join(format!("{}-{}", order.role, order.name)));
        let files =
            CredentialFiles { certificate: "cert.pem".into(), key: "key.pem".into(), ca: "ca.pem".into() }
                .relative_to(&folder);
        let config = folder.join(config_name(order.role));
        if !order.force
            && let Some(path) =
                [&files.certificate, &files.key, &files.ca, &config].into_iter().find(|path| path.exists())
        {
            return Err(PkiError::Exists {
                what: "a kit",
                path: path.clone(),
                advice: "--force replaces it (the old certificate stays valid until it expires), --out DIR writes elsewhere",
            });
        }

        let identity =
            Identity { federation: self.federation().clone(), role: order.role, name: order.name.clone() };
        let (hosts, endpoint) = self.place(order)?;
        let not_after = order.not_after.min(self.not_after);
        let key = KeyPair::generate()?;
        let params = member_params(&identity, &hosts, not_after)?;
        let serial =
            params.serial_number.as_ref().map(ToString::to_string).unwrap_or_default().replace(':', "");
        let certificate = params.signed_by(&key, &self.issuer)?.pem();

        make_folder(&folder, 0o755)?;
        write_file(&files.key, &key.serialize_pem(), SECRET)?;
        write_file(&files.certificate, &certificate, PUBLIC)?;
        write_file(&files.ca, &self.ca_pem, PUBLIC)?;
        write_file(&config, &config_text(&identity, &endpoint), PUBLIC)?;
        Credentials::load(&files)?;

        let records = self.directory.join("issued");
        make_folder(&records, 0o755)?;
        write_file(
            &records.join(format!("{}-{}-{serial}.pem", order.role, order.name)),
            &certificate,
            PUBLIC,
        )?;
        if order.role == Role::Aggregator {
            self.state.endpoint = Some(endpoint.clone());
            write_state(&self.directory, &self.state)?;
        }
        let hosts = hosts.iter().map(Host::to_text).collect();
        Ok(Kit { identity, folder, config, files, endpoint, hosts, not_after })
    }

    /// The hosts in the certificate, and the aggregator's address.
    fn place(&self, order: &KitOrder) -> Result<(Vec<Host>, ServerAddress), PkiError> {
        if order.role != Role::Aggregator {
            let endpoint = order.endpoint.as_ref().or(self.state.endpoint.as_ref());
            return Ok((Vec::new(), endpoint.ok_or(PkiError::NoEndpoint)?.clone()));
        }
        let endpoint = match &order.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => {
                let host = order.hosts.first().map_or_else(|| "localhost".to_owned(), Host::to_text);
                format!("{host}:{PORT}").parse().map_err(|_| PkiError::Host(host))?
            }
        };
        let mut hosts = if order.hosts.is_empty() { Host::this_machine() } else { order.hosts.clone() };
        // Whoever connects to the endpoint looks for its host in the certificate.
        let endpoint_host = endpoint.host().parse()?;
        if !hosts.contains(&endpoint_host) {
            hosts.push(endpoint_host);
        }
        Ok((hosts, endpoint))
    }
}

/// The certificates that the CA in `directory` issued, by member, the newest first.
///
/// # Errors
/// If there is no CA, or a record cannot be read.
pub fn issued(directory: &Path) -> Result<Vec<Issued>, PkiError> {
    if !directory.join("pki.toml").exists() {
        return Err(PkiError::NoCa(directory.to_owned()));
    }
    let folder = directory.join("issued");
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        outcome => outcome.map_err(file_error("read", &folder))?,
    };
    let mut issued = Vec::new();
    for entry in entries {
        let file = entry.map_err(file_error("read", &folder))?.path();
        if file.extension().is_none_or(|extension| extension != "pem") {
            continue;
        }
        let record = |source| PkiError::Record { path: file.clone(), source };
        let der = CertificateDer::from_pem_file(&file)
            .map_err(|error| record(IdentityError::Certificate(error.to_string())))?;
        let identity = Identity::from_certificate(&der).map_err(record)?;
        let validity = Validity::of_certificate(&der).map_err(record)?;
        issued.push(Issued { identity, validity, file });
    }
    issued.sort_by(|a, b| {
        let newest_first = b.validity.not_after.cmp(&a.validity.not_after);
        a.identity.cmp(&b.identity).then(newest_first).then_with(|| a.file.cmp(&b.file))
    });
    Ok(issued)
}

impl Issued {
    /// Days until the certificate expires; negative afterwards.
    pub fn days_left(&self, now: SystemTime) -> i64 {
        (OffsetDateTime::from(self.validity.not_after) - OffsetDateTime::from(now)).whole_days()
    }
}

fn member_params(
    identity: &Identity,
    hosts: &[Host],
    not_after: OffsetDateTime,
) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, identity.federation.as_str());
    params.distinguished_name.push(DnType::CommonName, format!("{} {}", identity.role, identity.name));
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.subject_alt_names.extend(hosts.iter().map(|host| host.0.clone()));
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // A site's certificate is not fit for a server, so that no site can pose as the aggregator.
    params.extended_key_usages = match identity.role {
        Role::Site | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Role::Aggregator => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.serial_number = Some(random_serial_number());
    set_validity(&mut params, not_after);
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, not_after: OffsetDateTime) {
    params.not_before = OffsetDateTime::now_utc().min(not_after) - CLOCK_SKEW;
    params.not_after = not_after;
}

/// 126 random bits: positive, and of one length in DER.
fn random_serial_number() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// Name of the configuration in a member's kit.
pub fn config_name(role: Role) -> &'static str {
    match role {
        Role::Site => "client.toml",
        Role::Operator => "operator.toml",
        Role::Aggregator => "aggregator.toml",
    }
}

fn config_text(identity: &Identity, endpoint: &ServerAddress) -> String {
    let Identity { federation, role, name } = identity;
    let tls = "[tls]\ncertificate = \"cert.pem\"\nkey = \"key.pem\"\nca = \"ca.pem\"\n";
    let head = format!(
        "# {role} {name} of the federation {federation}. Relative paths start at this file's folder.\n\n"
    );
    let body = match role {
        Role::Site => format!(
            r#"# The aggregator. The daemon opens connections to it and accepts none.
endpoint = "{endpoint}"
# What the daemon keeps between starts: tokenised text, checkpoints.
state_directory = "state"

{tls}
[data]
# EDIT THIS: the folder with this site's text (.txt and .jsonl, also .gz or .zst; .parquet).
path = "data"

[device]
# "auto" takes a CUDA GPU where there is one; else "cpu", "cuda" or, for a certain one, "cuda:1".
kind = "auto"
# CPU threads; 0 takes all.
threads = 0
"#
        ),
        Role::Operator => format!("# The aggregator.\nendpoint = \"{endpoint}\"\n\n{tls}"),
        Role::Aggregator => format!(
            r#"# Address and port to listen on.
listen = "0.0.0.0:{port}"
# Database, uploads, models and checkpoints.
state_directory = "state"

{tls}"#,
            port = endpoint.port()
        ),
    };
    head + &body
}

fn write_state(directory: &Path, state: &State) -> Result<(), PkiError> {
    let path = directory.join("pki.toml");
    let text = toml::to_string(state).map_err(|error| PkiError::File {
        action: "write",
        path: path.clone(),
        source: io::Error::other(error),
    })?;
    write_file(&path, &format!("# Written by `consort pki`.\n{text}"), PUBLIC)
}

fn make_folder(path: &Path, mode: u32) -> Result<(), PkiError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, mode);
    #[cfg(not(unix))]
    let _ = mode;
    builder.create(path).map_err(file_error("create", path))
}

/// Writes a file whole or not at all. It has its mode from the start: a key is never readable in between.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
        #[cfg(not(unix))]
        let _ = mode;
        let mut file = options.open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(file_error("write", path))
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PkiError + use<> {
    let path = path.to_owned();
    move |source| PkiError::File { action, path, source }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn authority() -> (TempDir, Authority) {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("pki");
        let authority =
            Authority::init(&directory, &"acme".parse().unwrap(), days_from_now(CA_DAYS), false).unwrap();
        (folder, authority)
    }

    fn order(role: Role, name: &str) -> KitOrder {
        KitOrder::new(role, name.parse().unwrap())
    }

    fn table(kit: &Kit) -> toml::Table {
        toml::from_str(&fs::read_to_string(&kit.config).unwrap()).unwrap()
    }

    #[cfg(unix)]
    fn mode(path: &Path) -> u32 {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn each_kit_is_complete_and_says_who_its_holder_is() {
        let (_folder, mut authority) = authority();
        for (role, name) in [(Role::Aggregator, "main"), (Role::Site, "paris"), (Role::Operator, "alice")] {
            let kit = authority.issue(&order(role, name)).unwrap();
            assert_eq!(kit.folder, authority.directory.join(format!("kits/{role}-{name}")));
            let credentials = Credentials::load(&kit.files).unwrap().require_role(role).unwrap();
            assert_eq!(credentials.identity().to_string(), format!("consort://acme/{role}/{name}"));
            assert_eq!(credentials.warnings(), [""; 0]);
            let now = SystemTime::now();
            let validity = credentials.validity();
            assert!(validity.not_before < now - std::time::Duration::from_secs(3500));
            assert!(validity.not_after > now + std::time::Duration::from_secs(824 * 86_400));
            let tls: CredentialFiles = table(&kit)["tls"].clone().try_into().unwrap();
            assert_eq!(tls.relative_to(&kit.folder), kit.files);
            let mut names: Vec<_> =
                fs::read_dir(&kit.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            let mut expected = ["ca.pem", "cert.pem", config_name(role), "key.pem"];
            expected.sort_unstable();
            assert_eq!(names, expected);
        }
    }

    #[cfg(unix)]
    #[test]
    fn keys_are_readable_by_their_owner_only() {
        let (_folder, mut authority) = authority();
        let kit = authority.issue(&order(Role::Aggregator, "main")).unwrap();
        assert_eq!(mode(&kit.files.key), 0o600);
        assert_eq!(mode(&authority.directory.join("ca/ca.key")), 0o600);
        assert_eq!(mode(&authority.directory.join("ca")), 0o700);
        // Also where a readable one was before.
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&kit.files.key, fs::Permissions::from_mode(0o644)).unwrap();
        authority.issue(&KitOrder { force: true, ..order(Role::Aggregator, "main") }).unwrap();
        assert_eq!(mode(&kit.files.key), 0o600);
    }

    #[test]
    fn the_key_of_the_ca_is_in_no_kit() {
        let (_folder, mut authority) = authority();
        let kit = authority.issue(&order(Role::Aggregator, "main")).unwrap();
        let key = fs::read_to_string(authority.directory.join("ca/ca.key")).unwrap();
        for entry in fs::read_dir(&kit.folder).unwrap() {
            assert!(
                !fs::read_to_string(entry.unwrap().path()).unwrap().contains(key.lines().nth(1).unwrap())
            );
        }
    }

    #[test]
    fn configurations_know_where_the_aggregator_listens() {
        let (_folder, mut authority) = authority();
        let error = authority.issue(&order(Role::Site, "paris")).unwrap_err();
        assert!(matches!(error, PkiError::NoEndpoint), "{error}");

        let aggregator = KitOrder {
            hosts: vec!["aggregator.example.org".parse().unwrap(), "[fd00::1]".parse().unwrap()],
            ..order(Role::Aggregator, "main")
        };
        let kit = authority.issue(&aggregator).unwrap();
        assert_eq!(kit.hosts, ["aggregator.example.org", "[fd00::1]"]);
        assert_eq!(table(&kit)["listen"].as_str(), Some("0.0.0.0:7443"));
        // Another process issues the site's.
        let mut authority = Authority::open(&authority.directory).unwrap();
        let kit = authority.issue(&order(Role::Site, "paris")).unwrap();
        let client = table(&kit);
        assert_eq!(client["endpoint"].as_str(), Some("aggregator.example.org:7443"));
        assert_eq!(client["state_directory"].as_str(), Some("state"));
        assert_eq!(client["data"]["path"].as_str(), Some("data"));
        assert_eq!(client["device"]["kind"].as_str(), Some("auto"));
        assert_eq!(client["device"]["threads"].as_integer(), Some(0));
        let other =
            KitOrder { endpoint: Some("10.0.0.1:1234".parse().unwrap()), ..order(Role::Operator, "alice") };
        assert_eq!(table(&authority.issue(&other).unwrap())["endpoint"].as_str(), Some("10.0.0.1:1234"));
    }

    #[test]
    fn the_endpoint_of_an_aggregator_is_in_its_certificate() {
        let (_folder, mut authority) = authority();
        let endpoint = Some("10.0.0.1:9000".parse().unwrap());
        let kit = authority.issue(&KitOrder { endpoint, ..order(Role::Aggregator, "main") }).unwrap();
        for host in ["localhost", "127.0.0.1", "[::1]", "10.0.0.1"] {
            assert!(kit.hosts.iter().any(|name| name == host), "{host} is not among {:?}", kit.hosts);
        }
        assert_eq!(table(&kit)["listen"].as_str(), Some("0.0.0.0:9000"));
    }

    #[test]
    fn nothing_is_overwritten_without_force() {
        let (_folder, mut authority) = authority();
        let first = authority.issue(&order(Role::Aggregator, "main")).unwrap();
        let certificate = fs::read(&first.files.certificate).unwrap();
        let error = authority.issue(&order(Role::Aggregator, "main")).unwrap_err().to_string();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::read(&first.files.certificate).unwrap(), certificate);
        authority.issue(&KitOrder { force: true, ..order(Role::Aggregator, "main") }).unwrap();
        assert_ne!(fs::read(&first.files.certificate).unwrap(), certificate);

        let ca = fs::read(authority.directory.join("ca/ca.pem")).unwrap();
        let again = |force| {
            Authority::init(&authority.directory, &"acme".parse().unwrap(), days_from_now(CA_DAYS), force)
        };
        let error = again(false).err().unwrap().to_string();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::read(authority.directory.join("ca/ca.pem")).unwrap(), ca);
        again(true).unwrap();
        assert_ne!(fs::read(authority.directory.join("ca/ca.pem")).unwrap(), ca);
        let kept = fs::read_dir(&authority.directory).unwrap().any(|entry| {
            let path = entry.unwrap().path();
            path.to_string_lossy().contains("ca.replaced-") && fs::read(path.join("ca.pem")).unwrap() == ca
        });
        assert!(kept, "the old CA is gone");
    }

    #[test]
    fn expired_kits_can_be_made_and_are_listed_as_such() {
        let (_folder, mut authority) = authority();
        authority.issue(&order(Role::Aggregator, "main")).unwrap();
        let not_after = OffsetDateTime::now_utc() - Duration::days(3);
        let kit = authority.issue(&KitOrder { not_after, ..order(Role::Site, "paris") }).unwrap();
        let credentials = Credentials::load(&kit.files).unwrap();
        assert!(credentials.warnings()[0].contains("expired 3 days ago"), "{:?}", credentials.warnings());

        // The list does not need the kits, which are moved to where they are used.
        fs::remove_dir_all(&kit.folder).unwrap();
        let issued = issued(&authority.directory).unwrap();
        let listed: Vec<_> = issued
            .iter()
            .map(|issued| (issued.identity.to_string(), issued.days_left(SystemTime::now())))
            .collect();
        assert_eq!(
            listed,
            [
                ("consort://acme/site/paris".to_owned(), -3),
                ("consort://acme/aggregator/main".to_owned(), 824)
            ]
        );
    }

    #[test]
    fn no_certificate_outlives_its_ca() {
        let folder = tempfile::tempdir().unwrap();
        let mut authority =
            Authority::init(folder.path(), &"acme".parse().unwrap(), days_from_now(10), false).unwrap();
        let kit = authority.issue(&order(Role::Aggregator, "main")).unwrap();
        assert!(kit.not_after <= days_from_now(10));
    }

    #[test]
    fn a_missing_or_damaged_ca_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let error = Authority::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("consort pki init"), "{error}");
        assert!(matches!(issued(folder.path()), Err(PkiError::NoCa(_))));

        let (_folder, authority) = authority();
        let key = KeyPair::generate().unwrap().serialize_pem();
        fs::write(authority.directory.join("ca/ca.key"), key).unwrap();
        let error = Authority::open(&authority.directory).err().unwrap().to_string();
        assert!(error.contains("ca.key does not belong to ca.pem"), "{error}");
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for host in ["localhost", "aggregator.example.org", "10.0.0.1", "::1", "[::1]"] {
            assert!(host.parse::<Host>().is_ok(), "{host}");
        }
        for host in ["", "https://x", "x:7443", "x y", "é.org", "*", "x/y"] {
            assert!(host.parse::<Host>().is_err(), "{host}");
        }
    }

    #[test]
    fn serial_numbers_differ() {
        let mut numbers: Vec<_> = (0..100).map(|_| random_serial_number().to_bytes()).collect();
        numbers.sort();
        numbers.dedup();
        assert_eq!(numbers.len(), 100);
        assert!(numbers.iter().all(|number| number.len() == 16 && number[0] < 0x80));
    }
}
