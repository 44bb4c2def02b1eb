//! `consort completions`: shells' completion scripts, from the command line's own definition.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{Arguments, failure::Failure, output};

/// Prints the script for `shell`.
pub fn print(shell: Shell) -> Result<(), Failure> {
    output::print(&script(shell))
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "consort", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shell_gets_a_script_that_knows_the_nouns() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell, Shell::Elvish] {
            let script = script(shell);
            for noun in ["runs", "rounds", "clients", "checkpoints", "pki", "tokenizer"] {
                assert!(script.contains(noun), "{shell}: {noun}");
            }
        }
    }
}
