//! Which shard a task of a job array does: every scheduler says it in a variable of its own.

use moepack_format::{Error, Result};

/// Where a task's number is told, in the order in which they are asked: a variable, what its numbers begin with, and who
/// sets it.
pub const VARIABLES: &[(&str, usize, &str)] = &[
    ("MOEPACK_SHARD", 0, "a person or a script"),
    ("SLURM_ARRAY_TASK_ID", 0, "Slurm, sbatch --array"),
    ("JOB_COMPLETION_INDEX", 0, "Kubernetes, Indexed Job"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", 0, "AWS Batch, array job"),
    ("PBS_ARRAY_INDEX", 0, "PBS, qsub -J"),
    ("SGE_TASK_ID", 1, "Grid Engine, qsub -t"),
    ("LSB_JOBINDEX", 1, "LSF, bsub -J name[1-n]"),
    ("OMPI_COMM_WORLD_RANK", 0, "Open MPI"),
    ("PMI_RANK", 0, "MPICH and its kin"),
    ("PARALLEL_SEQ", 1, "GNU parallel"),
];

/// The shard that `asked` means, `auto` being what the environment says, plus an offset.
///
/// # Errors
/// No number, or no variable that says one (kind `Usage`).
pub fn shard(asked: &str, offset: usize, variable: impl Fn(&str) -> Option<String>) -> Result<usize> {
    let (index, first, source) = match asked {
        "auto" => from_environment(variable)?,
        number => (number.to_owned(), 0, "--shard"),
    };
    let parsed = index.trim().parse::<usize>().ok().and_then(|i| i.checked_sub(first)?.checked_add(offset));
    parsed.ok_or_else(|| {
        Error::usage(format!("{source} is {index:?}, expected a whole number from {first}"))
            .hint("give --shard N, or --shard auto inside a task of a job array")
    })
}

fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Result<(String, usize, &'static str)> {
    // Outside of an array Grid Engine says `undefined` and LSF 0.
    let is_set = |name: &str, value: &str| match name {
        "SGE_TASK_ID" => value != "undefined",
        "LSB_JOBINDEX" => value != "0",
        _ => true,
    };
    let found = VARIABLES.iter().find_map(|(name, first, _)| {
        let value = variable(name).filter(|value| is_set(name, value))?;
        Some((value, *first, *name))
    });
    found.ok_or_else(|| {
        let names: Vec<&str> = VARIABLES.iter().map(|(name, ..)| *name).collect();
        Error::usage("--shard auto, but no variable says which task of a job array this is")
            .hint(format!("one of {} is read; or give --shard N", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(asked: &str, offset: usize, set: &[(&str, &str)]) -> Result<usize> {
        let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        shard(asked, offset, variable)
    }

    #[test]
    fn every_scheduler_is_understood() {
        for (name, first, _) in VARIABLES {
            assert_eq!(of("auto", 0, &[(name, &(first + 7).to_string())]), Ok(7), "{name}");
        }
        assert_eq!(of("auto", 1000, &[("SLURM_ARRAY_TASK_ID", "3")]), Ok(1003));
        assert_eq!(of("auto", 0, &[("SLURM_ARRAY_TASK_ID", "3"), ("MOEPACK_SHARD", "4")]), Ok(4));
        assert_eq!(of("auto", 0, &[("SGE_TASK_ID", "undefined"), ("PARALLEL_SEQ", "1")]), Ok(0));
        assert_eq!(of("12", 0, &[("MOEPACK_SHARD", "4")]), Ok(12));
    }

    #[test]
    fn the_page_has_the_table() {
        let page = include_str!("../../docs/cluster.md");
        let rows = VARIABLES.iter().map(|(name, first, who)| format!("| `{name}` | {first} | {who} |\n"));
        let table: String = rows.collect();
        assert!(page.contains(&table), "docs/cluster.md lacks\n{table}");
    }

    #[test]
    fn what_is_no_number_is_wrong_usage() {
        for (asked, set) in [
            ("auto", &[][..]),
            ("auto", &[("SLURM_ARRAY_TASK_ID", "x")]),
            ("auto", &[("SGE_TASK_ID", "0")]),
            ("-1", &[]),
            ("all", &[]),
        ] {
            assert_eq!(of(asked, 0, set).unwrap_err().kind().exit_code(), 2, "{asked} {set:?}");
        }
    }
}
