//! Who a certificate says that its holder is.
//!
//! The identity is a URI among the certificate's subject alternative names,
//! `consort://<federation>/<role>/<name>`. What a caller may do follows from it and from nothing that
//! the caller says in a message. This module parses what strangers send: it never panics, and it takes
//! one spelling only.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::ids::{NameError, SiteName};

const SCHEME: &str = "consort:";

/// Characters of an offending text that an error shows.
const SHOWN_CHARACTERS_MAX: usize = 160;

/// Name of a federation, as its certificates state it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Federation(SiteName);

impl Federation {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for Federation {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse().map(Self)
    }
}

impl TryFrom<String> for Federation {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Federation> for String {
    fn from(federation: Federation) -> String {
        federation.0.into()
    }
}

impl fmt::Display for Federation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the holder of a certificate is in its federation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A partner that trains on its own data.
    Site,
    /// A person, or a tool, that directs runs.
    Operator,
    /// The server.
    Aggregator,
}

impl Role {
    /// As the URI spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Site => "site",
            Self::Operator => "operator",
            Self::Aggregator => "aggregator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        [Self::Site, Self::Operator, Self::Aggregator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| IdentityError::Role(shown(text)))
    }
}

/// A member of a federation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The federation that vouches for it.
    pub federation: Federation,
    /// What it is there.
    pub role: Role,
    /// Its name, unique in the federation among those of its role.
    pub name: SiteName,
}

/// Why a URI or a certificate states no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not of the form at all.
    #[error("{0:?} is not an identity: expected consort://<federation>/<site|operator|aggregator>/<name>")]
    Form(String),
    /// No such role.
    #[error("{0:?} is not a role: expected site, operator or aggregator")]
    Role(String),
    /// The federation's part is not a name.
    #[error("the identity's federation: {0}")]
    Federation(#[source] NameError),
    /// The last part is not a name.
    #[error("the identity's name: {0}")]
    Name(#[source] NameError),
    /// Not a certificate.
    #[error("cannot read the certificate: {0}")]
    Certificate(String),
    /// A certificate of some other use.
    #[error(
        "the certificate names no member of a federation: it has no consort:// URI; use one that `consort pki issue` wrote"
    )]
    Missing,
    /// Several identities in one certificate: which one would count is anyone's guess, so none does.
    #[error("the certificate names {0} members of a federation; it must name exactly one")]
    Several(usize),
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}//{}/{}/{}", self.federation, self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;
    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(shown(uri));
        let path = uri.strip_prefix(SCHEME).and_then(|rest| rest.strip_prefix("//")).ok_or_else(form)?;
        let mut parts = path.split('/');
        let (Some(federation), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        Ok(Self {
            federation: federation.parse().map_err(IdentityError::Federation)?,
            role: role.parse()?,
            name: name.parse().map_err(IdentityError::Name)?,
        })
    }
}

impl Identity {
    /// Reads the identity from a certificate. Says nothing about who signed it: the TLS layer verified
    /// that before.
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let certificate = parse(der)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate(format!("its alternative names: {error}")))?
            .ok_or(IdentityError::Missing)?;
        // The scheme in any case counts as an attempt to state an identity; `parse` then takes one
        // spelling only, so that two readers cannot disagree.
        let identities: Vec<&str> = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .filter(|uri| uri.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME)))
            .collect();
        match identities.as_slice() {
            [] => Err(IdentityError::Missing),
            [uri] => uri.parse(),
            several => Err(IdentityError::Several(several.len())),
        }
    }
}

/// When a certificate may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Not before this time.
    pub not_before: SystemTime,
    /// Not after this time.
    pub not_after: SystemTime,
}

impl Validity {
    /// Reads the dates of a certificate.
    pub fn of_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let certificate = parse(der)?;
        let time = |seconds: i64| {
            let distance = Duration::from_secs(seconds.unsigned_abs());
            let epoch = SystemTime::UNIX_EPOCH;
            if seconds < 0 { epoch.checked_sub(distance) } else { epoch.checked_add(distance) }
                .ok_or_else(|| IdentityError::Certificate("its dates are out of range".to_owned()))
        };
        let validity = certificate.validity();
        Ok(Self {
            not_before: time(validity.not_before.timestamp())?,
            not_after: time(validity.not_after.timestamp())?,
        })
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(IdentityError::Certificate("bytes follow its end".to_owned())),
        Err(error) => Err(IdentityError::Certificate(error.to_string())),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, CustomExtension, KeyPair, SanType};

    use super::*;

    fn certificate(names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.not_before = rcgen::date_time_ymd(2001, 2, 3);
        params.not_after = rcgen::date_time_ymd(2101, 2, 3);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(text.try_into().unwrap())
    }

    fn check(uri: &str, expected: &str) {
        let outcome = match uri.parse::<Identity>() {
            Ok(identity) => format!("{} {} {}", identity.federation, identity.role, identity.name),
            Err(error) => error.to_string(),
        };
        assert!(outcome.contains(expected), "{uri:?} gave {outcome:?}, expected {expected:?}");
    }

    #[test]
    fn each_part_of_the_uri_is_checked() {
        check("consort://acme/site/paris-1", "acme site paris-1");
        check("consort://acme/operator/alice", "acme operator alice");
        check("consort://acme/aggregator/main", "acme aggregator main");
        check("", "not an identity");
        check("consort:", "not an identity");
        check("consort:acme/site/paris", "not an identity");
        check("Consort://acme/site/paris", "not an identity");
        check("https://acme/site/paris", "not an identity");
        check("consort://acme/site", "not an identity");
        check("consort://acme/site/paris/", "not an identity");
        check("consort://acme/site/paris?x=1", "identity's name");
        check("consort://acme/site/%70aris", "identity's name");
        check("consort://acme/site/par\0is", "identity's name");
        check("consort://acme/site/", "identity's name");
        check("consort://ACME/site/paris", "identity's federation");
        check("consort://user@acme:80/site/paris", "identity's federation");
        check("consort:///site/paris", "identity's federation");
        check("consort://acme/Site/paris", "not a role");
        check("consort://acme/root/paris", "not a role");
        check("consort://acme//paris", "not a role");
    }

    #[test]
    fn a_long_hostile_text_is_cut_in_the_error() {
        let error = "x".repeat(1 << 20).parse::<Identity>().unwrap_err().to_string();
        assert!(error.len() < 400, "{} characters", error.len());
    }

    #[test]
    fn the_identity_is_found_among_other_names() {
        let der = certificate(vec![
            dns("aggregator.example.org"),
            uri("https://example.org/"),
            uri("consort://acme/aggregator/main"),
            SanType::IpAddress([127, 0, 0, 1].into()),
        ]);
        assert_eq!(Identity::from_certificate(&der).unwrap().to_string(), "consort://acme/aggregator/main");
    }

    #[test]
    fn a_certificate_without_an_identity_is_refused() {
        assert_eq!(Identity::from_certificate(&certificate(vec![])), Err(IdentityError::Missing));
        assert_eq!(
            Identity::from_certificate(&certificate(vec![dns("consort"), uri("https://acme/site/paris")])),
            Err(IdentityError::Missing)
        );
    }

    #[test]
    fn a_certificate_with_two_identities_is_refused_even_if_one_is_misspelt_or_both_are_equal() {
        let paris = "consort://acme/site/paris";
        for other in [paris, "CONSORT://acme/site/rome", "consort:?"] {
            let der = certificate(vec![uri(paris), uri(other)]);
            assert_eq!(Identity::from_certificate(&der), Err(IdentityError::Several(2)), "{other}");
        }
    }

    #[test]
    fn a_misspelt_identity_is_refused() {
        let der = certificate(vec![uri("CONSORT://acme/site/paris")]);
        assert!(matches!(Identity::from_certificate(&der), Err(IdentityError::Form(_))));
    }

    #[test]
    fn a_second_list_of_names_is_refused() {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri("consort://acme/site/paris")];
        // An empty GeneralNames under the same object identifier.
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], vec![0x30, 0])];
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        assert!(matches!(Identity::from_certificate(&der), Err(IdentityError::Certificate(_))));
    }

    #[test]
    fn cut_or_extended_certificates_are_refused() {
        let der = certificate(vec![uri("consort://acme/site/paris")]);
        for length in 0..der.len() {
            assert!(Identity::from_certificate(&der[..length]).is_err(), "first {length} bytes");
        }
        let extended = [der.as_slice(), &[0]].concat();
        assert!(matches!(Identity::from_certificate(&extended), Err(IdentityError::Certificate(_))));
    }

    #[test]
    fn the_dates_are_read() {
        let validity = Validity::of_certificate(&certificate(vec![])).unwrap();
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(seconds(validity.not_before), 981_158_400);
        assert_eq!(seconds(validity.not_after), 4_136_832_000);
    }

    proptest! {
        #[test]
        fn identities_survive_text(
            federation in "[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?",
            role in prop_oneof![Just(Role::Site), Just(Role::Operator), Just(Role::Aggregator)],
            name in "[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?",
        ) {
            let identity = Identity {
                federation: federation.parse().unwrap(),
                role,
                name: name.parse().unwrap(),
            };
            prop_assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
        }

        #[test]
        fn any_text_is_parsed_to_itself_or_refused(text in "(consort://)?[ -~/é]{0,40}(/site/)?[ -~é]{0,20}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Identity::from_certificate(&bytes);
            let _ = Validity::of_certificate(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn a_damaged_certificate_is_read_without_panic(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            static ORIGINAL: std::sync::LazyLock<Vec<u8>> =
                std::sync::LazyLock::new(|| certificate(vec![uri("consort://acme/site/paris")]));
            let mut der = ORIGINAL.clone();
            for (position, byte) in damage {
                let position = position.index(der.len());
                der[position] = byte;
            }
            let _ = Identity::from_certificate(&der);
            let _ = Validity::of_certificate(&der);
        }
    }
}
