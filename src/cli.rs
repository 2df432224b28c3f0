//! From the command line to a command, and from an error to an exit code.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, value_parser};
use moepack_format::{Error, Result};

use crate::commands::COMMANDS;
use crate::memory::{Limit, imposed_limit};
use crate::output::{say, warn};
use crate::session::Session;
use crate::size;
use crate::stop::Stop;

/// The whole program: parses, runs, prints the error, chooses the exit code.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!(
            "error: this is a bug in moepack: {panic}\n  hint: please report it with the command you ran"
        ));
    }));
    let matches = match parser().try_get_matches() {
        Ok(matches) => matches,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let kind = e.kind();
            let e = if let Some(hint) = kind.usual_hint() { e.hint(hint) } else { e };
            say(&format!("error: {e}"));
            ExitCode::from(kind.exit_code())
        }
    }
}

/// The parser of the whole command line.
pub fn parser() -> clap::Command {
    let global = |name: &'static str| Arg::new(name).long(name).global(true).help_heading("Everywhere");
    clap::Command::new("moepack")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Turns released Mixture-of-Experts checkpoints into small deployable bundles and measures what accuracy was lost")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(110)
        .after_help(
            "Exit codes: 0 done, 1 a gate or check did not hold, 2 wrong usage, 65 bad input, 66 input missing, \
             73 cannot create output, 74 I/O error, 75 temporary (try again), 77 permission, 78 impossible recipe, 130 interrupted",
        )
        .subcommands(COMMANDS.iter().map(|c| c.parser()))
        .arg(global("json").action(ArgAction::SetTrue).help("Print one JSON document on stdout instead of a table"))
        .arg(global("quiet").short('q').action(ArgAction::SetTrue).help("No progress on stderr"))
        .arg(
            global("threads")
                .value_name("N")
                .value_parser(value_parser!(u16).range(1..=1024))
                .help("Worker threads [default: all CPUs]; the result does not depend on it"),
        )
        .arg(
            global("memory")
                .value_name("SIZE")
                .value_parser(size::parse_arg)
                .help("Memory the run may take, such as 4GiB; refused with the minimum where it cannot be met [default: what the control group and `ulimit -v` allow]"),
        )
}

fn run(matches: &ArgMatches) -> Result<()> {
    let (name, matches) = matches.subcommand().ok_or_else(|| Error::usage("no command given"))?;
    let command = COMMANDS.iter().find(|c| c.name == name);
    let command = command.ok_or_else(|| Error::usage(format!("unknown command {name:?}")))?;
    let session = session(matches)?;
    session.in_pool(|| (command.run)(matches, &session))
}

fn session(matches: &ArgMatches) -> Result<Session> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if let Ok(asked) = std::env::var(moepack_quant::isa::ISA_ENV) {
        let got = moepack_quant::Isa::get().name();
        if asked != got {
            warn(&format!(
                "{}={asked} is not to be had on this CPU, using {got}",
                moepack_quant::isa::ISA_ENV
            ));
        }
    }
    let asked = matches.get_one::<u64>("memory").map(|&bytes| Limit { bytes, of: "--memory" });
    Ok(Session {
        json: matches.get_flag("json"),
        quiet: matches.get_flag("quiet"),
        threads: matches.get_one::<u16>("threads").map_or(cpus, |&n| usize::from(n)),
        memory: asked.into_iter().chain(imposed_limit()).min_by_key(|limit| limit.bytes),
        stop: Stop::on_signals()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_sound() {
        parser().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_that_parses() {
        for command in COMMANDS {
            assert!(!command.examples.is_empty(), "{}", command.name);
            for example in command.examples {
                let words: Vec<&str> = example.split(" > ").next().unwrap().split_whitespace().collect();
                parser().try_get_matches_from(&words).unwrap_or_else(|e| panic!("{example}: {e}"));
            }
        }
    }
}
