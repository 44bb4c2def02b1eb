//! TLS for both sides: 1.3 only, certificates on both sides, one federation's CA and no other.
//!
//! `mod.rs` loads credentials and makes rustls configurations of them; `dial.rs` opens connections for
//! clients, and `failure.rs` says precisely why one could not be opened; `incoming.rs` accepts them for
//! servers, each a `connection.rs`. The cryptography (aws-lc-rs) is passed explicitly: nothing here depends on a process-wide
//! default, and nothing here can be configured to be weaker.

mod connection;
mod dial;
mod failure;
mod incoming;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use serde::{Deserialize, Serialize};

pub use connection::Connection;
pub use dial::{AddressError, ServerAddress, connect_channel, connect_channel_lazy, dial};
pub use failure::{ConnectError, Refusal, explain};
pub use incoming::{IncomingLimits, PeerInfo, incoming, peer_identity};

use crate::identity::{Federation, Identity, IdentityError, Role, Validity};

/// Largest PEM file that is read, in bytes; a chain of certificates takes a few thousand.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// A certificate with less time left than this is worth a warning.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// How often a connection is probed, and how long the answer may take, in both directions. An hour of
/// local training sends nothing: without probes a firewall forgets the connection, and a peer whose
/// machine died is never noticed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// See [`KEEPALIVE_INTERVAL`].
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// HTTP/2 flow-control windows in bytes, one stream and one connection. Sketch: 1 Gbit/s with a round
/// trip of 100 ms has 12.5 MB in flight; HTTP/2's own 64 KiB would allow 5 Mbit/s. A connection has room
/// beside one full stream, so that a transfer that waits for the disk holds up no other call.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// See [`STREAM_WINDOW_BYTES`].
pub const CONNECTION_WINDOW_BYTES: u32 = 24 << 20;

/// The `[tls]` table of every configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialFiles {
    /// This party's certificate (PEM), with intermediate ones after it if there are any.
    pub certificate: PathBuf,
    /// Its private key (PEM, unencrypted, readable by nobody else).
    pub key: PathBuf,
    /// The federation's CA certificate (PEM; several while one replaces another).
    pub ca: PathBuf,
}

impl CredentialFiles {
    /// The same files with relative paths taken from `folder`, where the configuration file lies.
    pub fn relative_to(&self, folder: &Path) -> Self {
        Self {
            certificate: folder.join(&self.certificate),
            key: folder.join(&self.key),
            ca: folder.join(&self.ca),
        }
    }
}

/// Who this party is and whom it believes: loaded once, cheap to clone.
#[derive(Clone)]
pub struct Credentials {
    identity: Identity,
    validity: Validity,
    warnings: Vec<String>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read the {what} {path}: {source}; {advice}", path = path.display())]
    Read {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A file holds something else.
    #[error("the {what} {path} is not usable: {reason}", path = path.display())]
    Content {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The certificate is of another key.
    #[error(
        "the certificate {certificate} and the key {key} do not belong together: copy both from the same kit",
        certificate = certificate.display(), key = key.display()
    )]
    KeyMismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The certificate states no identity.
    #[error("the certificate {path} is not usable: {source}", path = path.display())]
    Identity {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// The certificate is that of another kind of member.
    #[error(
        "the certificate is {found}'s, but this program needs one of role {expected}: use the folder that `consort pki issue {expected} NAME` wrote"
    )]
    Role {
        /// The role that the program needs.
        expected: Role,
        /// Whose certificate it is.
        found: Identity,
    },
    /// rustls does not accept what was loaded.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
}

impl Credentials {
    /// Loads the files and checks them against each other. What will make a peer refuse us, but is the
    /// peer's to judge (an expired certificate, one of another CA), is among the [warnings](Self::warnings).
    pub fn load(files: &CredentialFiles) -> Result<Self, CredentialsError> {
        let roots = load_roots(&files.ca)?;
        let chain = load_certificates("certificate", &files.certificate)?;
        let key = load_key(&files.key)?;

        let identity_error = |source| CredentialsError::Identity { path: files.certificate.clone(), source };
        let identity = Identity::from_certificate(&chain[0]).map_err(identity_error)?;
        let validity = Validity::of_certificate(&chain[0]).map_err(identity_error)?;

        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client_verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| CredentialsError::Setup(error.to_string()))?;

        let mut warnings = Vec::new();
        warnings.extend(permission_warning(&files.key));
        warnings.extend(validity_warning(&files.certificate, validity, SystemTime::now()));
        warnings.extend(issuer_warning(files, client_verifier.as_ref(), &chain, validity));

        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::KeyMismatch {
                certificate: files.certificate.clone(),
                key: files.key.clone(),
            },
            error => {
                CredentialsError::Content { what: "key", path: files.key.clone(), reason: error.to_string() }
            }
        })?;
        let key = Arc::new(SingleCertAndKey::from(key));
        let setup = |error: rustls::Error| CredentialsError::Setup(error.to_string());
        Ok(Self {
            identity,
            validity,
            warnings,
            server: make_server_config(client_verifier, key.clone(), provider.clone()).map_err(setup)?,
            client: make_client_config(roots, key, provider)?,
        })
    }

    /// Refuses credentials of another role than the program's.
    pub fn require_role(self, expected: Role) -> Result<Self, CredentialsError> {
        if self.identity.role == expected {
            Ok(self)
        } else {
            Err(CredentialsError::Role { expected, found: self.identity })
        }
    }

    /// Who the certificate says that we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Our federation.
    pub fn federation(&self) -> &Federation {
        &self.identity.federation
    }

    /// When our certificate may be used.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// What a person should see to: sentences, each with what to do.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

// The configurations hold the key.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// For servers: TLS 1.3, a certificate of the federation's CA required from every caller, HTTP/2.
pub fn server_config(credentials: &Credentials) -> Arc<ServerConfig> {
    credentials.server.clone()
}

/// For clients: TLS 1.3, the server's name verified against the federation's CA, HTTP/2. Who the server is
/// has to be checked after the handshake: use [`dial`], which does.
pub fn client_config(credentials: &Credentials) -> Arc<ClientConfig> {
    credentials.client.clone()
}

fn make_server_config(
    verifier: Arc<dyn ClientCertVerifier>,
    key: Arc<SingleCertAndKey>,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(key);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would carry over a certificate that has expired since. Connections last for
    // hours; a full handshake on each costs about a millisecond.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn make_client_config(
    roots: Arc<RootCertStore>,
    key: Arc<SingleCertAndKey>,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<ClientConfig>, CredentialsError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| CredentialsError::Setup(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| CredentialsError::Setup(error.to_string()))?
        .with_webpki_verifier(verifier)
        .with_client_cert_resolver(key);
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|source| CredentialsError::Read {
            what,
            path: path.to_owned(),
            advice: match source.kind() {
                io::ErrorKind::NotFound => {
                    "check the path in the [tls] table (relative paths start at the configuration file's folder)"
                }
                io::ErrorKind::PermissionDenied => "run as the user who owns the file, or give the file to that user",
                _ => "copy it again from the kit",
            },
            source,
        })?;
    if bytes.len() as u64 > PEM_BYTES_MAX {
        return Err(CredentialsError::Content {
            what,
            path: path.to_owned(),
            reason: format!("it is larger than {PEM_BYTES_MAX} bytes, which no PEM file here is"),
        });
    }
    Ok(bytes)
}

fn load_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let content = |reason| CredentialsError::Content { what, path: path.to_owned(), reason };
    let bytes = read(what, path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| content(format!("it is not PEM ({error}); copy it again from the kit")))?;
    if certificates.is_empty() {
        return Err(content(
            "no certificate (-----BEGIN CERTIFICATE-----) is in it; copy it again from the kit".into(),
        ));
    }
    Ok(certificates)
}

fn load_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let bytes = read("key", path)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| CredentialsError::Content {
        what: "key",
        path: path.to_owned(),
        reason: format!("no unencrypted private key (-----BEGIN PRIVATE KEY-----) is in it ({error}); copy it again from the kit"),
    })
}

fn load_roots(path: &Path) -> Result<Arc<RootCertStore>, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates("CA certificate", path)? {
        roots.add(certificate).map_err(|error| CredentialsError::Content {
            what: "CA certificate",
            path: path.to_owned(),
            reason: format!("{error}; copy ca.pem again from the kit"),
        })?;
    }
    Ok(Arc::new(roots))
}

#[cfg(unix)]
fn permission_warning(key: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(key).ok()?.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then(|| {
        format!(
            "other users of this machine can read the key {path} (mode {mode:04o}); run: chmod 600 {path}",
            path = key.display()
        )
    })
}

#[cfg(not(unix))]
fn permission_warning(_key: &Path) -> Option<String> {
    None
}

fn validity_warning(path: &Path, validity: Validity, now: SystemTime) -> Option<String> {
    let days = |longer: SystemTime, shorter: SystemTime| {
        longer.duration_since(shorter).map_or(0, |left| left.as_secs() / (24 * 3600))
    };
    let path = path.display();
    if now > validity.not_after {
        let days = days(now, validity.not_after);
        Some(format!(
            "the certificate {path} expired {days} days ago: ask the federation's operator for a new kit"
        ))
    } else if now < validity.not_before {
        Some(format!("the certificate {path} is not valid yet: check this machine's clock"))
    } else if now + RENEWAL > validity.not_after {
        let days = days(validity.not_after, now);
        Some(format!(
            "the certificate {path} expires in {days} days: ask the federation's operator for a new kit"
        ))
    } else {
        None
    }
}

fn issuer_warning(
    files: &CredentialFiles,
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    validity: Validity,
) -> Option<String> {
    // At a time when the certificate is valid, so that only its issuer is judged.
    let since_epoch = validity.not_after.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::since_unix_epoch(since_epoch)).err().map(|error| {
        format!(
            "the certificate {} does not stem from the CA in {} ({error}): peers will refuse it; copy all files from the same kit",
            files.certificate.display(),
            files.ca.display()
        )
    })
}
