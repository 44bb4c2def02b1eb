//! Certificates that `consort pki` does not issue: expired ones, and ones of another federation's name.

use std::{fs, path::Path};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use time::OffsetDateTime;

use crate::TestFederation;

/// Writes a kit whose certificate states `identity` (a whole URI), is signed by the federation's own CA and
/// ends at `not_after`.
pub fn write_kit(federation: &TestFederation, folder: &Path, identity: &str, not_after: OffsetDateTime) {
    let ca = federation.path().join("pki/ca");
    let read = |name: &str| fs::read_to_string(ca.join(name)).expect("the CA can be read");
    let ca_key = KeyPair::from_pem(&read("ca.key")).expect("the CA's key is one");
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).expect("the CA can issue");

    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(identity.try_into().expect("a URI is ASCII"))];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = not_after - time::Duration::days(2);
    params.not_after = not_after;
    let key = KeyPair::generate().expect("a key can be made");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate can be signed");

    fs::create_dir_all(folder).expect("the kit can be written");
    let files =
        [("cert.pem", certificate.pem()), ("key.pem", key.serialize_pem()), ("ca.pem", read("ca.pem"))];
    for (name, text) in files {
        fs::write(folder.join(name), text).expect("the kit can be written");
    }
}
