//! Names and digests: parsed at the edge into types that cannot be wrong.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest name of a site, an operator or a run, in characters.
pub const NAME_CHARACTERS_MAX: usize = 40;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a name; allowed: 1 to {NAME_CHARACTERS_MAX} of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)]
pub struct NameError {
    /// The offending text, cut to a length that can be shown.
    pub text: String,
}

fn check_name(text: &str) -> Result<(), NameError> {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let valid = text.len() <= NAME_CHARACTERS_MAX
        && text.chars().all(|c| c == '-' || alphanumeric(Some(c)))
        && alphanumeric(text.chars().next())
        && alphanumeric(text.chars().last());
    if valid {
        Ok(())
    } else {
        Err(NameError { text: text.chars().take(NAME_CHARACTERS_MAX + 20).collect() })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                check_name(&text).map(|()| Self(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// Name of a partner site (or an operator, or an aggregator), as its certificate states it.
    SiteName
);
name!(
    /// Name of a run, unique on its aggregator.
    RunName
);

/// Names one computed delta: 16 random bytes, drawn once and kept with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeltaId([u8; 16]);

/// Why bytes or text do not name a delta.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the id of a delta: expected 16 bytes (32 hexadecimal digits)")]
pub struct DeltaIdError;

impl DeltaId {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// The 16 bytes, as messages carry them.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl From<[u8; 16]> for DeltaId {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<&[u8]> for DeltaId {
    type Error = DeltaIdError;
    fn try_from(bytes: &[u8]) -> Result<Self, DeltaIdError> {
        bytes.try_into().map(Self).map_err(|_| DeltaIdError)
    }
}

impl TryFrom<String> for DeltaId {
    type Error = DeltaIdError;
    fn try_from(text: String) -> Result<Self, DeltaIdError> {
        let plain = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = plain.then(|| u128::from_str_radix(&text, 16).ok()).flatten();
        number.map(|number| Self(number.to_be_bytes())).ok_or(DeltaIdError)
    }
}

impl From<DeltaId> for String {
    fn from(id: DeltaId) -> String {
        id.to_string()
    }
}

impl fmt::Display for DeltaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why bytes or text are not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a BLAKE3 digest: expected 32 bytes (64 hexadecimal digits)")]
pub struct DigestError;

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest of a large buffer, computed on all cores; equal to [`Digest::of`].
    pub fn of_parallel(bytes: &[u8]) -> Self {
        Self(*blake3::Hasher::new().update_rayon(bytes).finalize().as_bytes())
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 32 bytes, as messages carry them.
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl TryFrom<&[u8]> for Digest {
    type Error = DigestError;
    fn try_from(bytes: &[u8]) -> Result<Self, DigestError> {
        bytes.try_into().map(Self).map_err(|_| DigestError)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        blake3::Hash::from_hex(text).map(Self::from).map_err(|_| DigestError)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_a_name_as_it_stands_or_refused(text in "([a-z0-9-]{0,42}|\\PC{0,42})") {
            if let Ok(name) = text.parse::<SiteName>() {
                prop_assert_eq!(name.as_str(), &text);
                // It becomes the name of a folder.
                prop_assert!(!text.is_empty() && text.len() <= 40 && !text.contains(['/', '.']));
                prop_assert!(text.parse::<RunName>().is_ok());
            }
        }

        #[test]
        fn any_bytes_are_a_digest_or_an_id_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(Digest::try_from(bytes.as_slice()).is_ok(), bytes.len() == 32);
            prop_assert_eq!(DeltaId::try_from(bytes.as_slice()).is_ok(), bytes.len() == 16);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert!(text.parse::<Digest>().is_err() && DeltaId::try_from(text).is_err());
        }
    }

    #[test]
    fn names_are_labels() {
        for good in ["a", "site-1", "0", "a-b-c"] {
            assert_eq!(good.parse::<SiteName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "..", "é", &"a".repeat(41)] {
            assert!(bad.parse::<SiteName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn delta_ids_round_trip_through_text_and_bytes() {
        let id = DeltaId::random();
        assert_eq!(DeltaId::try_from(id.to_string()).unwrap(), id);
        assert_eq!(DeltaId::try_from(id.to_vec().as_slice()).unwrap(), id);
        for bad in ["", "0", "zz345678901234567890123456789012", "+2345678901234567890123456789012"] {
            assert!(DeltaId::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_round_trip_through_text_and_bytes() {
        let digest = Digest::of(b"consort");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(Digest::try_from(digest.to_vec().as_slice()).unwrap(), digest);
        assert!(Digest::try_from(&[0u8; 31][..]).is_err());
        assert_eq!(Digest::of_parallel(&[7; 1 << 20]), Digest::of(&[7; 1 << 20]));
    }
}
