//! `moepack convert`: a checkpoint or bundle for other people's programs.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use clap::builder::PossibleValuesParser;
use moepack_convert::write::{Export, MatrixError, TARGETS, Target, Wish};
use moepack_format::manifest::FileEntry;
use moepack_format::{Error, Result, storage};
use moepack_quant::codec;
use serde::Serialize;
use serde_json::json;

use super::options::OpenArgs;
use super::quantize::check_places;
use super::{Command, parse};
use crate::engine::export::{Job, Outcome, export};
use crate::engine::space::check_space;
use crate::engine::workspace::refuse_existing;
use crate::memory::peak_rss_bytes;
use crate::output::{print, print_json, say, table};
use crate::session::Session;
use crate::size::human;

mod imatrix;

/// The table row.
pub const COMMAND: Command = Command {
    name: "convert",
    about: "Write a checkpoint or bundle for other programs: llama.cpp, vLLM, transformers, MLX, or as it was released",
    examples: &[
        "moepack convert qwen3.moepack --to gguf -o qwen3-gguf --split-max-size 20GB",
        "moepack convert v3.moepack --to compressed-tensors -o v3-int4",
        "moepack convert qwen3.moepack --to mlx -o qwen3-mlx --base-model Qwen/Qwen3-30B-A3B",
        "moepack convert v3.moepack --to safetensors -o v3",
        "moepack convert Qwen3-30B-A3B --to mlx -o qwen3-mlx --requantize int4-g64",
        "moepack convert qwen3.stats --to imatrix -o qwen3-imatrix.gguf",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

/// Tensors shown of those that were coded anew; the JSON has them all.
const SHOWN: usize = 10;

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint, Hugging Face cache directory, or bundle; for an imatrix the stats that `calibrate` wrote
    model: PathBuf,
    /// What to write.
    #[arg(long, value_name = "TARGET", value_parser = targets(), help = target_help())]
    to: String,
    /// The directory to write; of an imatrix the file
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// BF16 even where the bytes of the release are there (safetensors), or of matrices that no type holds (gguf)
    #[arg(long)]
    dequantize: bool,
    /// Code every expert matrix of another codec anew, rounded to nearest; what that adds is reported
    #[arg(long, value_name = "CODEC")]
    requantize: Option<String>,
    /// Split files at this size, such as 5GB; an expert or a stack of them is never split
    #[arg(long, visible_alias = "split-max-size", value_name = "SIZE", value_parser = crate::size::parse_arg)]
    max_shard_size: Option<u64>,
    /// Repository of the base model, for the model card
    #[arg(long, value_name = "ORG/NAME")]
    base_model: Option<String>,
    /// Go on with unfinished work (the same command does so anyway)
    #[arg(long)]
    resume: bool,
    /// Replace an export that is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    output: String,
    target: &'static str,
    kind: &'static str,
    resumed: bool,
    seconds: f64,
    peak_rss_bytes: u64,
    total_bytes: u64,
    files: &'a [FileEntry],
    /// Matrices that were coded anew, with the error that this added.
    requantized: &'a [MatrixError],
    notes: Vec<String>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    if let Some(form) = imatrix::form(&args.to) {
        return imatrix::run(args, form, session);
    }
    let started = Instant::now();
    check_places(&args.model, &args.output)?;
    refuse_existing(&args.output, args.overwrite)?;
    let target = Target::named(&args.to).ok_or_else(|| Error::usage("unknown target"))?;
    let requantize = args.requantize.as_deref().map(codec).transpose()?;
    let model = args.open.open(&args.model)?;
    let base_model = args.base_model.clone().or_else(|| repository(&args.model));
    let name = name_of(&args.model, base_model.as_deref());
    let made = Export::of(
        &model,
        Wish { target, dequantize: args.dequantize, requantize: requantize.clone(), name },
    )?;
    let bytes_max = args.max_shard_size.unwrap_or(made.shard_bytes());
    let mut options = json!({"target": target.name(), "dequantize": args.dequantize,
        "requantize": requantize.as_ref().map(|c| c.name()), "max_shard_size": bytes_max, "base_model": base_model});
    let shards = made.shards(bytes_max)?;
    let sizes = || shards.iter().map(|s| s.bytes);
    check_space(&args.output, sizes().sum(), sizes().max().unwrap_or(0))?;
    if model.zeroes() {
        options["nan_policy"] = json!("zero");
    }
    let job = Job {
        model: &model,
        export: &made,
        shards: &shards,
        target: &args.output,
        overwrite: args.overwrite,
        base_model: base_model.as_deref(),
        options,
    };
    let outcome = session.in_pool(|| export(session, &job))?;
    let notes: Vec<String> =
        made.notes().iter().chain(&outcome.notes).cloned().chain(model.zeroed_note()).collect();
    let seconds = started.elapsed().as_secs_f64();
    let total_bytes = outcome.files.iter().map(|f| f.bytes).sum();
    if session.json {
        return print_json(&Report {
            schema: "moepack.convert/1",
            output: args.output.display().to_string(),
            target: target.name(),
            kind: made.kind(),
            resumed: outcome.resumed,
            seconds,
            peak_rss_bytes: peak_rss_bytes().unwrap_or(0),
            total_bytes,
            files: &outcome.files,
            requantized: &outcome.errors,
            notes,
        });
    }
    notes.iter().for_each(|note| say(&format!("note: {note}")));
    print(&text(&outcome, &args.output, made.kind(), seconds))
}

fn text(outcome: &Outcome, output: &Path, kind: &str, seconds: f64) -> String {
    let mut rows = vec![["file", "bytes", "sha256"].map(String::from).to_vec()];
    for file in &outcome.files {
        let hash = file.sha256.get(..16).unwrap_or_default();
        rows.push(vec![file.path.clone(), human(file.bytes), hash.to_owned()]);
    }
    let total = outcome.files.iter().map(|f| f.bytes).sum();
    let mut text = table(&rows);
    text += &added(&outcome.errors);
    text + &format!("{}: {kind}, {}, in {seconds:.1} s\n", output.display(), human(total))
}

/// The matrices that lost most by being coded anew.
fn added(errors: &[MatrixError]) -> String {
    if errors.is_empty() {
        return String::new();
    }
    let mut worst: Vec<&MatrixError> = errors.iter().collect();
    worst.sort_by(|a, b| b.error.total_cmp(&a.error).then_with(|| a.tensor.cmp(&b.tensor)));
    let mut rows = vec![["coded anew", "was", "is", "added rel. sq. error"].map(String::from).to_vec()];
    for e in worst.iter().take(SHOWN) {
        rows.push(vec![e.tensor.clone(), e.from.clone(), e.to.clone(), format!("{:.3e}", e.error)]);
    }
    let mean = errors.iter().map(|e| e.error).sum::<f64>() / errors.len() as f64;
    let more = errors.len().saturating_sub(SHOWN);
    format!(
        "\n{}{} matrices coded anew ({more} more than shown, see --json), mean {mean:.3e}\n",
        table(&rows),
        errors.len()
    )
}

/// What the model is called: as its base model, or as the directory it lies in.
fn name_of(path: &Path, base_model: Option<&str>) -> String {
    let directory = storage::canonicalize(path).ok().and_then(|p| Some(p.file_name()?.to_str()?.to_owned()));
    let directory = directory.map(|name| name.trim_end_matches(".moepack").to_owned());
    let base = base_model.and_then(|base| base.rsplit('/').next()).map(str::to_owned);
    let name = base.or(directory).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    let name = name.trim_start_matches(['.', '-']);
    if name.is_empty() { "model".to_owned() } else { name.to_owned() }
}

/// The repository whose cache directory this is.
fn repository(path: &Path) -> Option<String> {
    let name =
        path.components().filter_map(|c| c.as_os_str().to_str()?.strip_prefix("models--")).next_back()?;
    name.split_once("--").map(|(org, name)| format!("{org}/{name}"))
}

fn targets() -> PossibleValuesParser {
    let models = TARGETS.iter().map(|(_, name, _)| *name);
    PossibleValuesParser::new(models.chain(imatrix::TARGETS.iter().map(|(name, ..)| *name)))
}

fn target_help() -> String {
    let stats = imatrix::TARGETS.iter().map(|(name, _, doc)| (name, doc));
    let all = TARGETS.iter().map(|(_, name, doc)| (name, doc)).chain(stats);
    let lines = all.map(|(name, doc)| format!("\n  {name:<20}{doc}"));
    format!("What to write:{}", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_directory_tells_its_repository() {
        let found = |path: &str| repository(Path::new(path));
        assert_eq!(
            found("hub/models--Qwen--Qwen3-30B-A3B/snapshots/1"),
            Some("Qwen/Qwen3-30B-A3B".to_owned())
        );
        assert_eq!(found("Qwen3-30B-A3B"), None);
    }

    #[test]
    fn a_model_is_called_as_its_base_or_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v3 Tiny.moepack");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(name_of(&path, None), "v3-Tiny");
        assert_eq!(name_of(&path, Some("deepseek-ai/DeepSeek-V3")), "DeepSeek-V3");
        assert_eq!(name_of(&path, Some("../..")), "model");
    }
}
