//! The site's binary: see `consort_client::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    consort_client::cli::main()
}
