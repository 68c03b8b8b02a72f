//! What the command line can do with a document: put it out, show it again, draw it, compare it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::charts::{self, Chart};
use super::compare::{by_scenario, comparable, compare};
use super::document::{Document, Run, Verdict};
use super::html;
use super::plot::Place;
use super::threshold::{Bounds, Threshold};

/// How a command ended, if it could be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Every promise and every bound was kept.
    Good,
    /// A promise was broken.
    Violation,
    /// A bound was not kept.
    Missed,
}

/// Where a run's document goes, and what it must fulfil.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Output {
    /// Writes the result as JSON to this file, too.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Writes a report as one HTML page, which needs no network, to this file, too.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Exits with 3 unless this holds of the figures, such as `p99_ms <= 500`. Any number of
    /// times.
    #[arg(long, value_name = "BOUND")]
    pub(crate) require: Vec<Threshold>,
    /// Exits with 3 if this holds of the figures. Any number of times.
    #[arg(long, value_name = "BOUND")]
    pub(crate) fail_if: Vec<Threshold>,
}

impl Output {
    /// Prints the summary, writes the files, and looks at the bounds.
    ///
    /// # Errors
    ///
    /// A file cannot be written, or a bound names a figure that there is not.
    pub(crate) fn deliver(&self, document: &Document) -> Result<End> {
        say(&document.to_string());
        if let Some(file) = &self.json {
            write(file, &document.json()?)?;
        }
        if let Some(file) = &self.html {
            write(file, &html::page(document))?;
        }
        if document.verdict() == Verdict::Fail {
            return Ok(End::Violation);
        }
        let bounds = Bounds {
            require: &self.require,
            fail_if: &self.fail_if,
        };
        let missed = bounds.missed(document)?;
        for miss in &missed {
            say(&format!("  ✗ {miss}\n"));
        }
        Ok(if missed.is_empty() {
            End::Good
        } else {
            End::Missed
        })
    }
}

/// Shows a document again.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// A document that a run wrote with --json.
    file: PathBuf,
    /// The summary for the terminal instead of the page.
    #[arg(long)]
    text: bool,
}

impl ReportArgs {
    /// Prints the page, or the summary.
    ///
    /// # Errors
    ///
    /// The file is no document.
    pub(crate) fn run(&self) -> Result<End> {
        let document = Document::read(&self.file)?;
        if self.text {
            say(&document.to_string());
        } else {
            say(&html::page(&document));
        }
        Ok(End::Good)
    }
}

/// Draws the plots of a document.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PlotArgs {
    /// A document that a run wrote with --json.
    file: PathBuf,
    /// The SVG file to write, for --plot; or a directory, for all of them.
    #[arg(long)]
    out: PathBuf,
    /// Which plot: percentiles, latency, throughput, outcomes, remaining, memory, ladder or cpu.
    #[arg(long)]
    plot: Option<String>,
    /// Of which phase, if not of the last one that has the plot.
    #[arg(long)]
    phase: Option<String>,
    /// Of which scenario, if the document is a suite.
    #[arg(long)]
    scenario: Option<String>,
}

impl PlotArgs {
    /// Writes the files.
    ///
    /// # Errors
    ///
    /// The file is no document, or has no such plot.
    pub(crate) fn run(&self) -> Result<End> {
        let mut runs = runs(Document::read(&self.file)?);
        if let Some(scenario) = &self.scenario {
            runs.retain(|run| run.scenario == *scenario);
        }
        let [run] = runs.as_slice() else {
            bail!("say of which run with --scenario: there are {}", runs.len());
        };
        let phases = run.phases.iter().rev();
        let wanted = |name: &str| self.phase.as_ref().is_none_or(|phase| phase == name);
        let mut charts: Vec<Chart> = charts::of_run(run);
        for phase in phases.filter(|phase| wanted(&phase.name)) {
            for chart in charts::of_phase(phase) {
                if charts.iter().all(|known| known.name != chart.name) {
                    charts.push(chart);
                }
            }
        }
        let known: Vec<&str> = charts.iter().map(|chart| chart.name).collect();
        match &self.plot {
            Some(name) => {
                let chart = charts.iter().find(|chart| chart.name == name);
                let chart = chart.with_context(|| {
                    format!("there is no plot {name:?}, but {}", known.join(", "))
                })?;
                write(&self.out, &chart.svg(Place::File))?;
            }
            None => {
                fs::create_dir_all(&self.out)
                    .with_context(|| format!("{} is no directory", self.out.display()))?;
                for chart in &charts {
                    let file = self.out.join(format!("{}.svg", chart.name));
                    write(&file, &chart.svg(Place::File))?;
                }
            }
        }
        Ok(End::Good)
    }
}

/// Compares two builds by the documents of their runs.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// Runs of the old build: a file, a directory of files, several with commas between them, or
    /// a pattern with one * in the file's name.
    old: String,
    /// Runs of the new build.
    new: String,
    /// Compares the figures of single phases, too.
    #[arg(long)]
    phases: bool,
    /// Compares what differs in settings or machine, too.
    #[arg(long)]
    force: bool,
    /// Exits with 3 if a figure is worse for certain, and by more than this, such as 5%.
    #[arg(long, value_name = "SHARE", value_parser = percent)]
    fail_if_worse: Option<f64>,
}

impl CompareArgs {
    /// Prints the comparison.
    ///
    /// # Errors
    ///
    /// The files are no documents, or what they hold is not comparable.
    pub(crate) fn run(&self) -> Result<End> {
        let (old, mut new) = (by_scenario(read(&self.old)?), by_scenario(read(&self.new)?));
        if !old.keys().eq(new.keys()) {
            let names = |runs: Vec<&String>| {
                let names: Vec<&str> = runs.into_iter().map(String::as_str).collect();
                names.join(", ")
            };
            bail!(
                "scenarios differ: {} and {}",
                names(old.keys().collect()),
                names(new.keys().collect())
            );
        }
        let mut end = End::Good;
        for (scenario, old) in old {
            let new = new.remove(&scenario).unwrap_or_default();
            if !self.force {
                comparable(&old, &new)?;
            }
            let comparison = compare(&old, &new, self.phases)?;
            say(&format!("{comparison}\n"));
            let worse = |share| {
                comparison
                    .rows
                    .iter()
                    .filter(move |row| row.is_worse_by(share))
            };
            for row in self.fail_if_worse.into_iter().flat_map(worse) {
                say(&format!(
                    "  ✗ {} is worse: {:.3} times\n",
                    row.name, row.ratio
                ));
                end = End::Missed;
            }
        }
        Ok(end)
    }
}

/// Reads `5%` and `0.05`.
fn percent(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.strip_suffix('%') {
        Some(number) => (number.trim_end(), 100.0),
        None => (text, 1.0),
    };
    match number.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number / unit),
        _ => Err("a share such as 5% or 0.05".to_owned()),
    }
}

/// The runs of all files that an argument names.
fn read(argument: &str) -> Result<Vec<Run>> {
    let mut all = Vec::new();
    for part in argument.split(',') {
        for file in files(Path::new(part))? {
            all.extend(runs(Document::read(&file)?));
        }
    }
    if all.is_empty() {
        bail!("{argument} names no document");
    }
    Ok(all)
}

/// A file, those of a directory, or those whose names have a beginning and an end.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let (dir, begin, end) = match name.as_deref().and_then(|name| name.split_once('*')) {
        Some((begin, end)) => {
            let dir = path.parent().unwrap_or(Path::new(""));
            let dir = if dir.as_os_str().is_empty() {
                Path::new(".")
            } else {
                dir
            };
            (dir, begin.to_owned(), end.to_owned())
        }
        None if path.is_dir() => (path, String::new(), ".json".to_owned()),
        None => return Ok(vec![path.to_owned()]),
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("{} cannot be read", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_one = name
            .strip_prefix(&begin)
            .is_some_and(|rest| rest.ends_with(&end));
        if is_one {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn runs(document: Document) -> Vec<Run> {
    match document {
        Document::Run(run) => vec![*run],
        Document::Suite(suite) => suite.runs,
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))
}

fn say(text: &str) {
    // Nobody is left to tell when the terminal is gone.
    let _ = io::stdout().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn files_are_found_by_name_directory_and_pattern() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a1.json", "a2.json", "b1.json", "a.txt"] {
            fs::write(at(name), "").unwrap();
        }
        assert_eq!(files(&at("a.txt")).unwrap(), [at("a.txt")]);
        assert_eq!(
            files(&at("a*.json")).unwrap(),
            [at("a1.json"), at("a2.json")]
        );
        assert_eq!(files(dir.path()).unwrap().len(), 3);
    }

    #[test]
    fn shares_are_read_with_and_without_a_sign() {
        for text in ["5%", "5 %", "0.05"] {
            assert!((percent(text).unwrap() - 0.05).abs() < 1e-12, "{text}");
        }
        for text in ["-1%", "five", "inf", ""] {
            assert!(percent(text).is_err(), "{text}");
        }
    }

    /// A run in a file of its own.
    fn file(dir: &Path, name: &str, run: Run) -> String {
        let file = dir.join(name);
        fs::write(&file, Document::Run(Box::new(run)).json().unwrap()).unwrap();
        file.to_string_lossy().into_owned()
    }

    #[test]
    fn a_figure_that_got_worse_decides_how_the_comparison_ends() {
        let dir = tempfile::tempdir().unwrap();
        let old = file(dir.path(), "old.json", sample::run(3));
        let mut slow = sample::run(4);
        let halved = |value: &mut f64| *value /= 2.0;
        for row in &mut slow.phases[0].speed.as_mut().unwrap().series.rows {
            row.accepted /= 2;
        }
        slow.figures
            .iter_mut()
            .filter(|figure| figure.name == "accepted_per_s")
            .for_each(|figure| halved(&mut figure.value));
        let new = file(dir.path(), "new.json", slow);
        let compare = |new: &str, share: Option<f64>| {
            let args = CompareArgs {
                old: old.clone(),
                new: new.to_owned(),
                phases: false,
                force: false,
                fail_if_worse: share,
            };
            args.run()
        };
        assert_eq!(compare(&new, Some(0.05)).unwrap(), End::Missed);
        assert_eq!(compare(&new, Some(0.6)).unwrap(), End::Good);
        assert_eq!(compare(&new, None).unwrap(), End::Good);
        let other = file(dir.path(), "ladder.json", sample::ladder());
        let refusal = compare(&other, None).unwrap_err().to_string();
        assert!(refusal.contains("scenarios differ"), "{refusal}");
    }

    #[test]
    fn output_writes_what_was_asked_for_and_looks_at_the_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let output = |bound: &str| Output {
            json: Some(dir.path().join("out.json")),
            html: Some(dir.path().join("out.html")),
            require: vec![bound.parse().unwrap()],
            fail_if: Vec::new(),
        };
        let run = Document::Run(Box::new(sample::run(3)));
        assert_eq!(output("p99_ms >= 0").deliver(&run).unwrap(), End::Good);
        assert_eq!(output("p99_ms < 0").deliver(&run).unwrap(), End::Missed);
        let back = Document::read(&dir.path().join("out.json")).unwrap();
        assert_eq!(back.json().unwrap(), run.json().unwrap());
        let page = fs::read_to_string(dir.path().join("out.html")).unwrap();
        assert_eq!(page, html::page(&run));
        // What is wrong is not measured against bounds.
        let broken = Document::Run(Box::new(sample::broken()));
        assert_eq!(
            output("p99_ms < 0").deliver(&broken).unwrap(),
            End::Violation
        );
    }

    #[test]
    fn plots_are_written_one_by_one_or_all() {
        let dir = tempfile::tempdir().unwrap();
        let args = PlotArgs {
            file: file(dir.path(), "run.json", sample::ladder()).into(),
            out: dir.path().join("plots"),
            plot: None,
            phase: None,
            scenario: None,
        };
        args.run().unwrap();
        assert_eq!(fs::read_dir(&args.out).unwrap().count(), 8);
        let one = PlotArgs {
            plot: Some("latency".to_owned()),
            out: dir.path().join("one.svg"),
            ..args.clone()
        };
        one.run().unwrap();
        let wrong = PlotArgs {
            plot: Some("latencies".to_owned()),
            ..args
        };
        let error = wrong.run().unwrap_err().to_string();
        assert!(
            error.contains("but ladder, cpu, percentiles, latency"),
            "{error}"
        );
    }
}
