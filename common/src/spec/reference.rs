//! The commented reference of the run specification: hand-written, and held to the code by its tests.

use super::RunSpec;

impl RunSpec {
    /// A complete specification with every key, its default and its meaning, as TOML. Commented-out
    /// lines that begin with `#` and no space are settings; those with a space are prose.
    pub fn reference() -> &'static str {
        include_str!("reference.toml")
    }
}
