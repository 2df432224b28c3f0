//! The table of commands. A new one is a file in `commands/` and a line in [`COMMANDS`]; the parser, the help, the
//! completions and the man page walk the table.

use clap::{ArgMatches, Args, FromArgMatches};
use moepack_format::{Error, Result};

use crate::session::Session;

pub mod baseline;
pub mod bench;
pub mod calibrate;
pub mod check;
pub mod completions;
pub mod convert;
pub mod inspect;
pub mod man;
pub mod merge;
pub mod options;
pub mod perplexity;
pub mod plan;
pub mod quantize;
pub mod status;
pub mod submit;
pub mod verify;
pub mod worker;

/// Every command, in the order of the help.
pub const COMMANDS: &[Command] = &[
    inspect::COMMAND,
    plan::COMMAND,
    quantize::COMMAND,
    calibrate::COMMAND,
    perplexity::COMMAND,
    verify::COMMAND,
    baseline::COMMAND,
    check::COMMAND,
    convert::COMMAND,
    bench::COMMAND,
    worker::COMMAND,
    merge::COMMAND,
    status::COMMAND,
    submit::COMMAND,
    completions::COMMAND,
    man::COMMAND,
];

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// What the user types.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Shown first in the help.
    pub examples: &'static [&'static str],
    /// Adds the command's arguments.
    pub args: fn(clap::Command) -> clap::Command,
    /// Does it.
    pub run: fn(&ArgMatches, &Session) -> Result<()>,
}

impl Command {
    /// The parser of this command.
    pub fn parser(&self) -> clap::Command {
        let template = "{about}\n\nExamples:\n{before-help}\n{usage-heading} {usage}\n\n{all-args}";
        let examples: String = self.examples.iter().map(|line| format!("  {line}\n")).collect();
        let parser = clap::Command::new(self.name).before_help(examples.trim_end().to_owned() + "\n");
        // After the arguments, whose groups bring descriptions of their own.
        (self.args)(parser).about(self.about).help_template(template)
    }
}

/// The typed arguments of a command.
///
/// # Errors
/// Arguments that do not fit; clap has refused them before.
pub fn parse<A: Args + FromArgMatches>(matches: &ArgMatches) -> Result<A> {
    A::from_arg_matches(matches).map_err(|e| Error::usage(e.to_string()))
}
