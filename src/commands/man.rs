//! `moepack man`: the manual page in roff.

use clap::Args;
use moepack_format::{Error, Kind, Result};

use super::{COMMANDS, Command, parse};
use crate::output::print;

/// The table row.
pub const COMMAND: Command = Command {
    name: "man",
    about: "Print the manual page (roff)",
    examples: &["moepack man > moepack.1", "moepack man quantize > moepack-quantize.1"],
    args: Arguments::augment_args,
    run: |matches, _| run(&parse(matches)?),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Page of one command instead of the overview
    command: Option<String>,
}

fn run(args: &Arguments) -> Result<()> {
    let parser = match &args.command {
        None => crate::cli::parser(),
        Some(name) => {
            let command = COMMANDS.iter().find(|c| c.name == name);
            let known: Vec<_> = COMMANDS.iter().map(|c| c.name).collect();
            let unknown = || Error::usage(format!("unknown command {name:?}, known are {}", known.join(" ")));
            command.ok_or_else(unknown)?.parser().name(format!("moepack-{name}"))
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(parser)
        .render(&mut page)
        .map_err(|e| Error::new(Kind::Io, format!("cannot write the manual page: {e}")))?;
    print(&String::from_utf8_lossy(&page))
}
