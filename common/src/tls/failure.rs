//! Why there is no connection to an aggregator: every kind of failure that has its own remedy, told apart.

use std::{error::Error, fmt, io};

use rustls::{AlertDescription, CertificateError, PeerIncompatible};

use crate::identity::Federation;

/// Why an aggregator does not accept our certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It got none.
    Missing,
    /// It was issued by a CA that the aggregator does not know.
    OtherCa,
    /// It expired.
    Expired,
    /// It was withdrawn.
    Revoked,
    /// For some other reason.
    Unacceptable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "it received none: set certificate and key in the [tls] table",
            Self::OtherCa => "another CA issued it: use the kit that this federation's operator sent",
            Self::Expired => "it has expired (or the aggregator's clock is wrong): ask the federation's operator for a new kit",
            Self::Revoked => "it was withdrawn: ask the federation's operator",
            Self::Unacceptable => "it is not one for a site or an operator: use the kit that this federation's operator sent",
        })
    }
}

/// Why there is no connection to the aggregator: each kind has its own remedy, and names it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The host name has no address.
    #[error(
        "cannot find the address of {host}: {reason}; check the endpoint's spelling and this machine's DNS"
    )]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// No TCP connection.
    #[error("cannot connect to {address}: {reason}; {}", connect_advice(*kind))]
    Connect {
        /// The aggregator's address.
        address: String,
        /// What the system said.
        reason: String,
        /// The kind of failure: refused, timed out, unreachable.
        kind: io::ErrorKind,
    },
    /// The peer accepts connections and says nothing.
    #[error(
        "{address} accepted the connection but did not answer: is it a Consort aggregator, or does a firewall intervene?"
    )]
    Silent {
        /// The aggregator's address.
        address: String,
    },
    /// The peer closed the connection without a reason.
    #[error(
        "{address} closed the connection while it was being set up ({reason}): is it a Consort aggregator, or does a firewall intervene?"
    )]
    Closed {
        /// The aggregator's address.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// The peer does not speak TLS.
    #[error("what listens at {address} does not speak TLS: check the endpoint's port")]
    NotTls {
        /// The aggregator's address.
        address: String,
    },
    /// The peer does not speak TLS 1.3.
    #[error(
        "{address} does not speak TLS 1.3, which every Consort aggregator does: check the endpoint, or a proxy on the way"
    )]
    TlsVersion {
        /// The aggregator's address.
        address: String,
    },
    /// The server's certificate is of another CA.
    #[error(
        "the certificate of {address} was not issued by the CA in our ca.pem: check the endpoint and that ca.pem is this federation's, or look for a proxy that replaces certificates"
    )]
    WrongCa {
        /// The aggregator's address.
        address: String,
    },
    /// The server's certificate is for other names.
    #[error(
        "the certificate of {address} is for {presented}, not for {expected}: use one of those names in the endpoint, or have the aggregator's certificate issued with --host {expected}"
    )]
    WrongName {
        /// The aggregator's address.
        address: String,
        /// The name that we looked for.
        expected: String,
        /// The names in the certificate.
        presented: String,
    },
    /// The server's certificate has expired.
    #[error("the certificate of {address} expired {} ago: the aggregator needs a new one (or this machine's clock is wrong)", days(*seconds_ago))]
    ServerCertificateExpired {
        /// The aggregator's address.
        address: String,
        /// How long ago.
        seconds_ago: u64,
    },
    /// The server's certificate is from the future.
    #[error("the certificate of {address} is not valid yet: check this machine's clock")]
    ServerCertificateNotYetValid {
        /// The aggregator's address.
        address: String,
    },
    /// The server's certificate is bad in some other way.
    #[error("the certificate of {address} is not acceptable: {reason}")]
    ServerCertificate {
        /// The aggregator's address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The server is not an aggregator.
    #[error(
        "{address} is not an aggregator: {found}; check the endpoint, and report this to the federation's operator if the endpoint is right"
    )]
    NotAnAggregator {
        /// The aggregator's address.
        address: String,
        /// What its certificate says.
        found: String,
    },
    /// The server is another federation's aggregator.
    #[error("{address} serves the federation {theirs}, our certificate is of {ours}: check the endpoint")]
    OtherFederation {
        /// The aggregator's address.
        address: String,
        /// Our federation.
        ours: Federation,
        /// The server's.
        theirs: Federation,
    },
    /// The server does not accept our certificate.
    #[error("the aggregator refused our certificate: {0}")]
    ClientCertificateRefused(Refusal),
    /// Anything else in TLS.
    #[error("TLS with {address} failed: {reason}")]
    Tls {
        /// The aggregator's address.
        address: String,
        /// Why.
        reason: String,
    },
}

fn connect_advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::ConnectionRefused => {
            "nothing listens there: check the port, and that the aggregator runs"
        }
        io::ErrorKind::TimedOut => "check that a firewall lets this machine connect to that port",
        _ => "check this machine's network",
    }
}

fn days(seconds: u64) -> String {
    match seconds / (24 * 3600) {
        0 => "less than a day".to_owned(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    }
}

/// The reason for a failed connection, if `error` (a `tonic::Status`, a transport's or an I/O error) or
/// any of its causes states one.
pub fn explain(error: &(dyn Error + 'static)) -> Option<ConnectError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<ConnectError>() {
            return Some(error.clone());
        }
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return Some(classify(error, "the aggregator"));
        }
        // An I/O error that wraps another one gives that one's cause as its own.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

pub(super) fn words(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    words
}

pub(super) fn classify_io(error: &io::Error, address: &str) -> ConnectError {
    let address = address.to_owned();
    if let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        return classify(error, &address);
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            ConnectError::Closed { address, reason: error.to_string() }
        }
        _ => ConnectError::Tls { address, reason: error.to_string() },
    }
}

fn classify(error: &rustls::Error, address: &str) -> ConnectError {
    let address = address.to_owned();
    match error {
        rustls::Error::InvalidCertificate(error) => classify_server_certificate(error, address),
        rustls::Error::AlertReceived(alert) => classify_alert(*alert, address),
        rustls::Error::PeerIncompatible(
            PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::ServerDoesNotSupportTls12Or13,
        ) => ConnectError::TlsVersion { address },
        rustls::Error::InvalidMessage(_) => ConnectError::NotTls { address },
        error => ConnectError::Tls { address, reason: error.to_string() },
    }
}

fn classify_server_certificate(error: &CertificateError, address: String) -> ConnectError {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => ConnectError::WrongCa { address },
        CertificateError::NotValidForNameContext { expected, presented } => ConnectError::WrongName {
            address,
            expected: expected.to_str().into_owned(),
            presented: hosts(presented),
        },
        CertificateError::ExpiredContext { time, not_after } => ConnectError::ServerCertificateExpired {
            address,
            seconds_ago: time.as_secs().saturating_sub(not_after.as_secs()),
        },
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            ConnectError::ServerCertificateNotYetValid { address }
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            ConnectError::NotAnAggregator {
                address,
                found: "its certificate is not one for servers".to_owned(),
            }
        }
        error => ConnectError::ServerCertificate { address, reason: error.to_string() },
    }
}

/// The hosts among a certificate's names, which rustls gives as `DnsName("x")`, `IpAddress(x)` and others.
fn hosts(presented: &[String]) -> String {
    let hosts: Vec<&str> = presented
        .iter()
        .filter_map(|name| {
            let dns = name.strip_prefix("DnsName(\"").and_then(|name| name.strip_suffix("\")"));
            dns.or_else(|| name.strip_prefix("IpAddress(").and_then(|name| name.strip_suffix(')')))
        })
        .collect();
    if hosts.is_empty() { "no host at all".to_owned() } else { hosts.join(", ") }
}

fn classify_alert(alert: AlertDescription, address: String) -> ConnectError {
    use AlertDescription as Alert;
    let refusal = match alert {
        Alert::CertificateRequired | Alert::NoCertificate => Refusal::Missing,
        // A wrong signature: a CA of the same name with another key.
        Alert::UnknownCA | Alert::DecryptError => Refusal::OtherCa,
        Alert::CertificateExpired => Refusal::Expired,
        Alert::CertificateRevoked => Refusal::Revoked,
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateUnknown
        | Alert::AccessDenied => Refusal::Unacceptable,
        Alert::ProtocolVersion => return ConnectError::TlsVersion { address },
        alert => return ConnectError::Tls { address, reason: format!("the server reports {alert:?}") },
    };
    ConnectError::ClientCertificateRefused(refusal)
}
