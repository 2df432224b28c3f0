//! `moepack completions`: a completion script for a shell.

use clap::Args;
use clap_complete::{Shell, generate};
use moepack_format::Result;

use super::{Command, parse};
use crate::output::print;

/// The table row.
pub const COMMAND: Command = Command {
    name: "completions",
    about: "Print a completion script for a shell",
    examples: &["moepack completions bash > ~/.local/share/bash-completion/completions/moepack"],
    args: Arguments::augment_args,
    run: |matches, _| run(&parse(matches)?),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The shell
    shell: Shell,
}

fn run(args: &Arguments) -> Result<()> {
    let mut script = Vec::new();
    generate(args.shell, &mut crate::cli::parser(), "moepack", &mut script);
    print(&String::from_utf8_lossy(&script))
}
