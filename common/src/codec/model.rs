//! How the global model reaches the sites.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::Encoding;

/// What follows the name of an encoding where updates are sent.
const UPDATE_SUFFIX: &str = "-update";

/// How the global model reaches the sites. Whatever the form, a version is what all sites hold: where the
/// form rounds, the aggregator rounds the version itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(try_from = "String", into = "String")]
pub enum ModelEncoding {
    /// The parameters, exact.
    #[default]
    Fp32,
    /// The parameters, rounded to bf16; what the rounding drops is kept and added to the next round's step.
    Bf16,
    /// What the round changed, in a delta encoding, for sites that hold the version before.
    Update(Encoding),
}

impl ModelEncoding {
    /// The encoding of a version's chunks when it is sent whole.
    pub fn whole(self) -> Encoding {
        match self {
            Self::Fp32 | Self::Update(_) => Encoding::Fp32,
            Self::Bf16 => Encoding::Bf16,
        }
    }

    /// The encoding of a version's chunks when what the round changed is sent.
    pub fn update(self) -> Option<Encoding> {
        match self {
            Self::Fp32 | Self::Bf16 => None,
            Self::Update(encoding) => Some(encoding),
        }
    }

    /// How much of what rounding dropped enters the next round's step; none: it is forgotten.
    pub fn residual_decay(self) -> Option<f32> {
        match self {
            Self::Fp32 => None,
            Self::Bf16 => Some(1.0),
            Self::Update(encoding) => encoding.error_feedback_decay(),
        }
    }
}

/// A name that no form has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "is {0:?}; allowed: \"fp32\", \"bf16\", or a delta encoding followed by \"-update\", as in \"bf16-update\""
)]
pub struct UnknownModelEncoding(String);

impl FromStr for ModelEncoding {
    type Err = UnknownModelEncoding;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match (name, name.strip_suffix(UPDATE_SUFFIX).and_then(Encoding::parse)) {
            ("fp32", _) => Ok(Self::Fp32),
            ("bf16", _) => Ok(Self::Bf16),
            (_, Some(encoding)) => Ok(Self::Update(encoding)),
            (_, None) => Err(UnknownModelEncoding(name.to_owned())),
        }
    }
}

impl TryFrom<String> for ModelEncoding {
    type Error = UnknownModelEncoding;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<ModelEncoding> for String {
    fn from(form: ModelEncoding) -> Self {
        form.to_string()
    }
}

impl fmt::Display for ModelEncoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fp32 => f.write_str("fp32"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Update(encoding) => write!(f, "{}{UPDATE_SUFFIX}", encoding.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_a_name_that_reads_back() {
        let updates = Encoding::ALL.map(ModelEncoding::Update);
        for form in [ModelEncoding::Fp32, ModelEncoding::Bf16].into_iter().chain(updates) {
            assert_eq!(form.to_string().parse(), Ok(form));
        }
        for wrong in ["", "update", "-update", "int9-update", "fp32-updates"] {
            assert!(wrong.parse::<ModelEncoding>().is_err(), "{wrong}");
        }
    }
}
