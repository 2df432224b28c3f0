//! The directory of a plan, and the names of all that lies in it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use moepack_format::{Error, Result};

use crate::cluster::plan::Piece;

const PLAN: &str = "plan.json";

/// Directories that a plan begins with.
pub const FOLDERS: &[&str] =
    &["activations", "attempts", "parts", "reports", "status", "submit", "bundle.partial"];

/// The directory of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanFolder(PathBuf);

impl PlanFolder {
    /// From what a user says: the directory, or the `plan.json` in it.
    pub fn of(path: &Path) -> PlanFolder {
        let is_file = path.file_name().is_some_and(|name| name == PLAN) && !path.is_dir();
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        PlanFolder(if is_file { dir.to_path_buf() } else { path.to_path_buf() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The plan itself.
    pub fn plan(&self) -> PathBuf {
        self.0.join(PLAN)
    }

    /// The calibration text as token windows.
    pub fn tokens(&self) -> PathBuf {
        self.0.join("tokens.json")
    }

    /// Copied stats.
    pub fn stats(&self) -> PathBuf {
        self.0.join("stats.bin")
    }

    /// Where activations are stored.
    pub fn activations(&self) -> PathBuf {
        self.0.join("activations")
    }

    /// Where attempts write.
    pub fn attempts(&self) -> PathBuf {
        self.0.join("attempts")
    }

    /// Where experts wait for the rest of their layer.
    pub fn parts(&self) -> PathBuf {
        self.0.join("parts")
    }

    /// Where scripts and job ids are kept.
    pub fn submit(&self) -> PathBuf {
        self.0.join("submit")
    }

    /// The bundle in the making.
    pub fn bundle(&self) -> PathBuf {
        self.0.join("bundle.partial")
    }

    /// What is known of a finished piece.
    pub fn report(&self, piece: Piece) -> PathBuf {
        self.0.join("reports").join(format!("{}.json", piece_name(piece)))
    }

    /// A shard's heartbeat.
    pub fn status(&self, shard: usize) -> PathBuf {
        self.0.join(format!("status/shard-{shard}.json"))
    }

    /// Where the bundle goes unless something else is said: beside the plan.
    ///
    /// # Errors
    /// A plan without a name.
    pub fn bundle_default(&self) -> Result<PathBuf> {
        let whole = std::path::absolute(&self.0).map_err(|e| Error::io(&e, "find", &self.0))?;
        let stem = whole.file_stem().ok_or_else(|| Error::usage("the plan has no name").in_file(&self.0))?;
        let mut name = stem.to_os_string();
        name.push(".moepack");
        Ok(self.0.parent().unwrap_or(Path::new("")).join(name))
    }
}

/// The name of a piece, without a suffix.
pub fn piece_name(piece: Piece) -> String {
    match piece {
        Piece::Trunk => "trunk".to_owned(),
        Piece::Bank { layer } => format!("experts-{layer:05}"),
        Piece::Experts { layer, first, end } => part_name(layer, &(first..end)),
    }
}

fn part_name(layer: usize, experts: &Range<usize>) -> String {
    format!("experts-{layer:05}.{:05}-{:05}", experts.start, experts.end)
}

/// The file that some experts of a layer wait in.
pub fn part_file(layer: usize, experts: &Range<usize>) -> String {
    part_name(layer, experts) + ".safetensors"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_its_directory_or_the_file_in_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(PLAN), "{}").unwrap();
        for path in [dir.path().to_path_buf(), dir.path().join(PLAN)] {
            assert_eq!(PlanFolder::of(&path).plan(), dir.path().join(PLAN));
        }
        assert_eq!(PlanFolder::of(Path::new("plan.json")).path(), Path::new("."));
    }

    #[test]
    fn the_bundle_goes_beside_the_plan() {
        let of = |plan: &str| PlanFolder::of(Path::new(plan)).bundle_default().unwrap();
        assert_eq!(of("/jobs/v4.plan"), Path::new("/jobs/v4.moepack"));
        assert_eq!(of("v4"), Path::new("v4.moepack"));
    }
}
