//! `convert STATS --to imatrix`: what calibration learnt, for llama.cpp's quantizers. It is a move like the others, of
//! stats instead of a model, so it is the same command.

use std::path::Path;
use std::time::Instant;

use moepack_convert::imatrix::Form;
use moepack_format::manifest::FileEntry;
use moepack_format::{Error, InputFile, Result, storage};

use super::{Arguments, Report};
use crate::engine::stats::{Exported, export_imatrix};
use crate::memory::peak_rss_bytes;
use crate::output::{print, print_json, refuse_existing_file};
use crate::session::Session;
use crate::size::human;

/// The targets: name, form, what the help says.
pub const TARGETS: &[(&str, Form, &str)] = &[
    ("imatrix", Form::Gguf, "stats of `calibrate` as llama.cpp's importance matrix, in GGUF; OUT is a file"),
    ("imatrix-dat", Form::Dat, "the same in the older form, which ik_llama.cpp reads"),
];

/// Experts that are named.
const NAMED: usize = 12;

/// The form that a target asks for; `None` if it is of models.
pub fn form(target: &str) -> Option<(&'static str, Form)> {
    TARGETS.iter().find(|(name, ..)| *name == target).map(|(name, form, _)| (*name, *form))
}

/// Writes it.
///
/// # Errors
/// Options that are of models; what the stats file or the disk says.
pub fn run(args: &Arguments, (target, form): (&'static str, Form), session: &Session) -> Result<()> {
    let started = Instant::now();
    refuse_options_of_models(args)?;
    refuse_same(&args.model, &args.output)?;
    refuse_existing_file(&args.output, args.overwrite)?;
    let exported = export_imatrix(&args.model, form, &args.output)?;
    let file = InputFile::open(&args.output)?;
    let path = args.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let files = [FileEntry { path, bytes: file.len(), sha256: file.sha256(&|| false)? }];
    let (seconds, output) = (started.elapsed().as_secs_f64(), args.output.display().to_string());
    let notes: Vec<String> = starved(&exported).into_iter().collect();
    if !session.json {
        let n = exported.n_entries;
        let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
        return print(&format!(
            "{notes}{output}: {target} of {n} tensors, {}, in {seconds:.1} s\n",
            human(file.len())
        ));
    }
    print_json(&Report {
        schema: "moepack.convert/1",
        output,
        target,
        kind: target,
        resumed: false,
        seconds,
        peak_rss_bytes: peak_rss_bytes().unwrap_or(0),
        total_bytes: file.len(),
        files: &files,
        requantized: &[],
        notes,
    })
}

fn refuse_options_of_models(args: &Arguments) -> Result<()> {
    let given = [
        ("--dequantize", args.dequantize),
        ("--requantize", args.requantize.is_some()),
        ("--max-shard-size", args.max_shard_size.is_some()),
        ("--base-model", args.base_model.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(Error::usage(format!("{option} is for models, not for --to {}", args.to))),
        None => Ok(()),
    }
}

fn refuse_same(input: &Path, output: &Path) -> Result<()> {
    match (storage::canonicalize(input), storage::canonicalize(output)) {
        (Ok(a), Ok(b)) if a == b => Err(Error::usage("output and input are the same").in_file(output)),
        _ => Ok(()),
    }
}

/// What llama.cpp will say of partial data.
fn starved(exported: &Exported) -> Option<String> {
    let all = &exported.without_tokens;
    let named: Vec<String> = all.iter().take(NAMED).map(|(l, e)| format!("{l}.{e}")).collect();
    let more = if all.len() > NAMED { " …" } else { "" };
    let (n, named) = (all.len(), named.join(" "));
    (n > 0).then(|| format!("{n} experts saw no token and count as llama.cpp counts them, all columns alike (layer.expert): {named}{more}"))
}
