//! Every goal in one go: the scenarios that measure them, one after the other, each as a command that
//! can be repeated by itself, and the table of goals that follows.

use std::env;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::clock;
use crate::report::{Document, Goal, Machine, Ratio, Run, Suite, Term, Verdict, Versions};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these scenarios.
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Part>,
    /// Minutes instead of a quarter of an hour: to see that everything works, not to quote.
    #[arg(long)]
    short: bool,
}

/// A scenario that the suite is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Baselines,
    Floor,
    Canonical,
    Drain,
    Scale,
    Sse,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::Baselines,
        Self::Floor,
        Self::Canonical,
        Self::Drain,
        Self::Scale,
        Self::Sse,
    ];

    /// Its subcommand.
    fn name(self) -> &'static str {
        match self {
            Self::Baselines => "baselines",
            Self::Floor => "floor",
            Self::Canonical => "canonical",
            Self::Drain => "drain",
            Self::Scale => "scale",
            Self::Sse => "sse",
        }
    }

    /// What makes it short.
    fn shortly(self) -> &'static [&'static str] {
        match self {
            Self::Baselines => &["--rounds", "1", "--for", "1s"],
            Self::Floor => &["--rounds", "1", "--orders", "20000"],
            Self::Canonical => &["--short"],
            Self::Drain => &["--orders", "50000", "--backlog", "20000"],
            Self::Scale => &["--orders", "100000"],
            Self::Sse => &["--subscribers", "2000", "--storm", "1000", "--lasts", "5s"],
        }
    }

    /// Runs it, in a process of its own: what it leaves in memory does not meet the next one.
    fn run(self, short: bool) -> Result<Run> {
        let dir = TempDir::with_prefix("stockade-suite-")?;
        let file = dir.path().join("run.json");
        let mut command = Command::new(env::current_exe()?);
        command.arg(self.name()).arg("--json").arg(&file);
        if short {
            command.args(self.shortly());
        }
        let status = command.stdout(Stdio::null()).status()?;
        ensure!(file.exists(), "it ended with {status}");
        match Document::read(&file)? {
            Document::Run(run) => Ok(*run),
            Document::Suite(_) => anyhow::bail!("it left a suite"),
        }
    }
}

/// Makes the runs.
///
/// # Errors
///
/// None could be made.
pub(crate) fn run(args: &Args) -> Result<Suite> {
    let (started_at, machine) = (clock::now(), Machine::here());
    let mut runs = Vec::new();
    let chosen = |part: &Part| args.only.is_empty() || args.only.contains(part);
    for part in Part::ALL.into_iter().filter(chosen) {
        say(&format!("{} …", part.name()));
        match part.run(args.short) {
            Ok(run) => runs.push(run),
            // What it would have measured is missing in the table, and everything else is there.
            Err(error) => say(&format!("{} left out: {error:#}", part.name())),
        }
    }
    let versions = runs.first().context("no scenario could be run")?;
    let versions: Versions = versions.versions.clone();
    let passed = runs.iter().all(|run| run.verdict == Verdict::Pass);
    Ok(Suite {
        started_at,
        command: crate::report::command(),
        machine,
        versions,
        verdict: if passed { Verdict::Pass } else { Verdict::Fail },
        goals: goals(&runs),
        runs,
    })
}

/// Nobody is left to tell when the terminal is gone.
fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// A figure as one side of a ratio; without a value if its scenario did not run, or broke a promise.
fn term(runs: &[Run], scenario: &str, figure: &str, name: &str, unit: &str) -> Term {
    let run = runs.iter().find(|run| run.scenario == scenario);
    let found = run.and_then(|run| run.figure(figure));
    Term::new(name, found.map(|figure| figure.value), unit)
}

/// The table of goals.
fn goals(runs: &[Run]) -> Vec<Ratio> {
    let beside = |figure, name| term(runs, "baselines", figure, name, "/s");
    let cost = |figure, name| term(runs, "baselines", figure, name, "µs");
    let hello = || beside("hello_per_s", "hello");
    let accepted = || beside("stockade_per_s", "accepted");
    let plain = |what, scenario, figure, unit, goal| {
        Ratio::plain(what, term(runs, scenario, figure, what, unit), goal)
    };
    vec![
        Ratio::of(
            "accepted, writer paused ÷ hello",
            beside("stockade_writer_paused_per_s", "accepted, writer paused"),
            hello(),
            Goal::at_least(0.5),
        ),
        Ratio::of(
            "accepted, writer draining ÷ hello",
            accepted(),
            hello(),
            Goal::at_least(0.35),
        ),
        Ratio::of(
            "accepted ÷ one script call per request",
            accepted(),
            beside("naive_per_s", "naive"),
            Goal::at_least(1.6),
        ),
        Ratio::of(
            "accepted ÷ Node",
            accepted(),
            beside("node_per_s", "Node"),
            Goal::at_least(15.0),
        ),
        Ratio::of(
            "accepted ÷ row locks",
            accepted(),
            beside("row_locks_per_s", "row locks"),
            Goal::at_least(15.0),
        ),
        Ratio::of(
            "accepted ÷ stored function",
            accepted(),
            beside("stored_function_per_s", "stored function"),
            Goal::at_least(15.0),
        ),
        Ratio::of(
            "sold-out refusals ÷ hello",
            beside("stockade_refusals_per_s", "refusals"),
            hello(),
            Goal::at_least(0.8),
        ),
        Ratio::of(
            "processor time per order: application ÷ hello",
            cost("stockade_application_us_per_accepted", "application"),
            cost("hello_application_us_per_accepted", "hello"),
            Goal::at_most(1.6),
        ),
        Ratio::of(
            "processor time per order: Redis ÷ one call per order",
            cost("stockade_redis_us_per_accepted", "Redis, coalesced"),
            cost("naive_redis_us_per_accepted", "Redis, naive"),
            Goal::at_most(1.0 / 3.0),
        ),
        Ratio::of(
            "rows drained ÷ COPY",
            term(runs, "floor", "drained_per_s", "drained", "/s"),
            term(runs, "floor", "copied_per_s", "COPY", "/s"),
            Goal::at_least(0.5),
        ),
        plain(
            "201 to row at 70 %, p99",
            "canonical",
            "stored_p99_ms",
            "ms",
            Goal::at_most(1000.0),
        ),
        plain(
            "live subscribers",
            "sse",
            "subscribers",
            "",
            Goal::at_least(19_000.0),
        ),
        plain(
            "memory per subscriber",
            "sse",
            "bytes_per_subscriber",
            "bytes",
            Goal::at_most(16_384.0),
        ),
        plain(
            "age of the stock shown, p99",
            "sse",
            "age_p99_ms",
            "ms",
            Goal::at_most(350.0),
        ),
        plain(
            "Redis memory per order",
            "canonical",
            "redis_bytes_per_order",
            "bytes",
            Goal::at_most(400.0),
        ),
        plain(
            "cost of a purchase, 10⁷ units ÷ 10³",
            "scale",
            "cost_growth",
            "×",
            Goal::at_most(1.5),
        ),
    ]
}
