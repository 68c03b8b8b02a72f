//! The document that a run leaves behind: what was asked for, on what machine, what came of it.
//!
//! `bench/schema.json` is made from these types, and `bench/README.md` explains them. Durations
//! are milliseconds, instants count from the opening, shares go from 0 to 1, and a number that
//! could not be measured is absent, never zero.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::operator::Audit;
use crate::scenarios::outage::Effect;
use crate::verdict::{Check, Status};

/// What a file may hold. The field `schema` says which, and names its version.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "schema")]
pub(crate) enum Document {
    /// One scenario.
    #[serde(rename = "stockade-bench/run/1")]
    Run(Box<Run>),
    /// Several, and the goals that follow from them.
    #[serde(rename = "stockade-bench/suite/1")]
    Suite(Box<Suite>),
}

/// One scenario, from its first request to its verdict.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Run {
    /// The subcommand that made it.
    pub(crate) scenario: String,
    /// When the harness started.
    pub(crate) started_at: DateTime<Utc>,
    /// The command line, ready for a shell.
    pub(crate) command: String,
    /// Repeats everything random.
    pub(crate) seed: u64,
    pub(crate) machine: Machine,
    pub(crate) versions: Versions,
    /// What was asked for, by option; also what was not given on the command line.
    pub(crate) settings: BTreeMap<String, Value>,
    /// Whether every promise was kept. Without it there are no speeds and no figures.
    pub(crate) verdict: Verdict,
    /// The first event that breaks a promise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first_violation: Option<String>,
    /// In the order in which they ran.
    pub(crate) phases: Vec<Phase>,
    /// The numbers to quote, those with a goal first. Empty if a promise was broken.
    pub(crate) figures: Vec<Figure>,
    /// What the subscriber of the live stock saw, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) live: Option<Live>,
    /// What an outage did, if there was one, and if no promise was broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) outage: Option<Effect>,
    /// The promises, one by one.
    pub(crate) checks: Vec<Check>,
    /// The server's own audit as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) audit: Option<Audit>,
}

/// Several runs on one machine, one after the other, and what they say together.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Suite {
    /// When the harness started.
    pub(crate) started_at: DateTime<Utc>,
    /// The command line, ready for a shell.
    pub(crate) command: String,
    pub(crate) machine: Machine,
    pub(crate) versions: Versions,
    /// `pass` if every run kept every promise. Goals missed do not count here.
    pub(crate) verdict: Verdict,
    /// The table of goals, mostly ratios of two runs.
    pub(crate) goals: Vec<Ratio>,
    pub(crate) runs: Vec<Run>,
}

/// A goal of the suite and what it was reached with.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ratio {
    /// What is compared, in words.
    pub(crate) what: String,
    /// Above the line.
    pub(crate) measured: Term,
    /// Below the line; absent for a goal that is a number by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reference: Option<Term>,
    /// The quotient, or the number itself. Absent if it could not be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<f64>,
    pub(crate) goal: Goal,
    /// Whether the goal was reached; absent if it could not be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
}

/// One side of a ratio.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Term {
    /// What it is, such as `hello`.
    pub(crate) name: String,
    /// Absent if it could not be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<f64>,
    pub(crate) unit: String,
}

/// What it ran on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    /// The model that the processor calls itself.
    pub(crate) cpu: String,
    /// Processors that the harness may use.
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    /// System, release and architecture, as `uname` gives them.
    pub(crate) kernel: String,
    /// Average number of runnable processes in the minute before the start: near 0 on a machine
    /// that was free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) load_before: Option<f64>,
}

/// What ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Versions {
    pub(crate) stockade: String,
    /// Of the work tree that the harness was built from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) commit: Option<String>,
    /// The work tree had changes that are in no commit.
    #[serde(default)]
    pub(crate) dirty: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) redis: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) postgres: Option<String>,
}

/// Whether every promise was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// Yes.
    Pass,
    /// One was broken, or could not be checked.
    Fail,
}

/// A part of a run with one load.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) arrivals: Arrivals,
    /// Kept-alive connections, and so requests in flight.
    pub(crate) connections: usize,
    /// More than `connections` if the limit of open files or the server allowed no more.
    pub(crate) connections_wanted: usize,
    /// From the opening to the last answer.
    pub(crate) duration_ms: f64,
    pub(crate) outcomes: Outcomes,
    /// Absent when a promise was broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) speed: Option<Speed>,
    /// What each process used meanwhile; empty if nobody looked.
    pub(crate) processes: Vec<Process>,
    pub(crate) generator: Generator,
}

/// When purchases are sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Arrivals {
    /// All at the opening.
    Burst,
    /// A Poisson process.
    Rate {
        /// Purchases per second, on average.
        per_s: f64,
    },
}

/// How the purchases ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Outcomes {
    pub(crate) purchases: usize,
    pub(crate) accepted: usize,
    /// Of the accepted: those whose first 201 was lost and came as a replay.
    pub(crate) replayed: usize,
    /// By code.
    pub(crate) refused: BTreeMap<String, usize>,
    /// By reason: certainly no order.
    pub(crate) failed: BTreeMap<String, usize>,
    /// By reason: perhaps an order.
    pub(crate) unknown: BTreeMap<String, usize>,
    /// Requests beyond the first of each purchase.
    pub(crate) retries: u64,
}

/// How fast it was.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Speed {
    /// Purchases that ended, per second, until the last one.
    pub(crate) requests_per_s: f64,
    /// Purchases accepted, per second, until the last acceptance.
    pub(crate) accepted_per_s: f64,
    /// From the opening to the acceptance of the last unit, by the server's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sold_out_after_ms: Option<f64>,
    /// From the opening until the last order was seen to be stored; at most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stored_after_ms: Option<f64>,
    pub(crate) latency_ms: Latency,
    /// Other durations that a scenario measured, by name, such as the age of the stock shown.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) other_ms: BTreeMap<String, Percentiles>,
    pub(crate) series: Series,
}

/// Where the time of a purchase went.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Latency {
    /// From the planned instant to the final answer, retries included.
    pub(crate) all: Percentiles,
    /// Of these: the accepted.
    pub(crate) accepted: Percentiles,
    /// Of these: the refused.
    pub(crate) refused: Percentiles,
    /// From sending the last try to its answer: hides what waited in the harness.
    pub(crate) service: Percentiles,
    /// From the planned instant to sending the first try: a free connection had to be waited for.
    pub(crate) send_delay: Percentiles,
}

/// Percentiles of some durations, in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Percentiles {
    /// How many durations.
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
    /// For plots: pairs of quantile and duration, five for each halving of what is left above.
    pub(crate) curve: Vec<(f64, f64)>,
}

/// The run over time, in intervals of one length.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Series {
    /// The length of an interval; the last one ends with the phase and may be shorter.
    pub(crate) interval_ms: f64,
    pub(crate) rows: Vec<Interval>,
}

/// One interval of a run. Purchases belong to the interval in which they ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Interval {
    /// Its beginning.
    pub(crate) at_ms: f64,
    /// Purchases whose first request left.
    pub(crate) sent: u64,
    pub(crate) accepted: u64,
    /// By code.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) refused: BTreeMap<String, u64>,
    /// Given up: failed and unknown.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) failed: u64,
    /// Latency of those that ended; absent if none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) p50_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) p99_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_ms: Option<f64>,
    /// Units left at its end, counted from the answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) remaining: Option<u64>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What one process used during a phase. Processes of one kind are added up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Process {
    /// `application`, `redis`, `writer`, `postgres`, `harness` …
    pub(crate) name: String,
    /// User and system time.
    pub(crate) cpu_ms: f64,
    /// Processor time in µs for each accepted purchase; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) us_per_accepted: Option<f64>,
    /// Processor time in µs for each purchase, whatever became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) us_per_request: Option<f64>,
    /// Resident memory at the end of the phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rss_bytes: Option<u64>,
    /// Over time, if somebody looked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) samples: Vec<Sample>,
}

/// A look at a process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sample {
    pub(crate) at_ms: f64,
    /// Used since the opening.
    pub(crate) cpu_ms: f64,
    pub(crate) rss_bytes: u64,
}

/// What the harness itself used while the crowd was at it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Generator {
    /// User and system time.
    pub(crate) cpu_ms: f64,
    pub(crate) wall_ms: f64,
    pub(crate) threads: usize,
    /// Of the time that its threads had.
    pub(crate) cpu_share: f64,
    /// It was so busy that it was probably what was slow.
    pub(crate) bottleneck: bool,
    /// Tries that left late although a connection was free.
    #[serde(default)]
    pub(crate) late: u64,
}

/// A number to quote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Figure {
    /// Unique in its run, lower case, with its unit last: `accepted_per_s`, `p99_ms`.
    pub(crate) name: String,
    pub(crate) value: f64,
    /// For people: `/s`, `ms`, `µs`, `bytes`, `×` or nothing.
    pub(crate) unit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) goal: Option<Goal>,
    /// Whether the goal was reached; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
}

/// What a number is to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Goal {
    pub(crate) op: Op,
    pub(crate) value: f64,
}

/// How a number stands to its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) enum Op {
    /// At least.
    #[serde(rename = ">=")]
    AtLeast,
    /// At most.
    #[serde(rename = "<=")]
    AtMost,
    /// More than.
    #[serde(rename = ">")]
    Above,
    /// Less than.
    #[serde(rename = "<")]
    Below,
}

/// What the subscriber of the live stock saw.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Live {
    pub(crate) frames: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first_remaining: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last_remaining: Option<u64>,
}

impl Op {
    /// As it is written.
    pub(crate) fn sign(self) -> &'static str {
        match self {
            Self::AtLeast => ">=",
            Self::AtMost => "<=",
            Self::Above => ">",
            Self::Below => "<",
        }
    }
}

impl Goal {
    /// A number that must be reached.
    pub(crate) fn at_least(value: f64) -> Self {
        let op = Op::AtLeast;
        Self { op, value }
    }

    /// A number that must not be passed.
    pub(crate) fn at_most(value: f64) -> Self {
        let op = Op::AtMost;
        Self { op, value }
    }

    /// Whether a value reaches it.
    pub(crate) fn is_met(&self, value: f64) -> bool {
        match self.op {
            Op::AtLeast => value >= self.value,
            Op::AtMost => value <= self.value,
            Op::Above => value > self.value,
            Op::Below => value < self.value,
        }
    }
}

impl Figure {
    /// A number without a goal.
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &str) -> Self {
        Self {
            name: name.into(),
            value,
            unit: unit.to_owned(),
            goal: None,
            met: None,
        }
    }

    /// Whether it is a number of the whole run, not of one of several phases.
    pub(crate) fn is_of_the_run(&self) -> bool {
        !self.name.contains('/')
    }

    /// The same number, measured against a goal.
    pub(crate) fn with_goal(self, goal: Goal) -> Self {
        Self {
            met: Some(goal.is_met(self.value)),
            goal: Some(goal),
            ..self
        }
    }
}

impl Term {
    /// A side that was measured.
    pub(crate) fn new(name: &str, value: Option<f64>, unit: &str) -> Self {
        Self {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
        }
    }
}

impl Ratio {
    /// One number over another.
    pub(crate) fn of(what: &str, measured: Term, reference: Term, goal: Goal) -> Self {
        let value = match (measured.value, reference.value) {
            (Some(measured), Some(reference)) if reference > 0.0 => Some(measured / reference),
            _ => None,
        };
        Self {
            what: what.to_owned(),
            measured,
            reference: Some(reference),
            value,
            goal,
            met: value.map(|value| goal.is_met(value)),
        }
    }

    /// A number with a goal of its own.
    pub(crate) fn plain(what: &str, measured: Term, goal: Goal) -> Self {
        let value = measured.value;
        Self {
            what: what.to_owned(),
            measured,
            reference: None,
            value,
            goal,
            met: value.map(|value| goal.is_met(value)),
        }
    }
}

/// What a scenario found: everything in a [`Run`] that is not known before it begins.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) phases: Vec<Phase>,
    /// Beyond those that every phase has.
    pub(crate) figures: Vec<Figure>,
    pub(crate) checks: Vec<Check>,
    pub(crate) live: Option<Live>,
    pub(crate) outage: Option<Effect>,
    pub(crate) audit: Option<Audit>,
}

/// A run that has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) scenario: &'static str,
    pub(crate) started_at: DateTime<Utc>,
    pub(crate) seed: u64,
    pub(crate) machine: Machine,
    pub(crate) versions: Versions,
    pub(crate) settings: BTreeMap<String, Value>,
}

impl Run {
    /// Judges: a run that broke a promise loses everything that says how fast it was, since how
    /// fast a shop is wrong is of no interest.
    pub(crate) fn new(begun: Begun, mut findings: Findings) -> Self {
        let failed = findings
            .checks
            .iter()
            .find(|check| check.status == Status::Fail);
        let first_violation = failed.map(|check| match check.counter_example.first() {
            Some(event) => format!("{}: {event}", check.name),
            None => format!("{}: {}, not {}", check.name, check.actual, check.expected),
        });
        let verdict = match first_violation {
            None => Verdict::Pass,
            Some(_) => Verdict::Fail,
        };
        let mut figures = findings.figures;
        if verdict == Verdict::Fail {
            for phase in &mut findings.phases {
                phase.speed = None;
                phase.processes.clear();
            }
            findings.outage = None;
            figures.clear();
        }
        let is_only = findings.phases.len() == 1;
        for phase in &findings.phases {
            for mut figure in phase.figures() {
                if !is_only {
                    figure.name = format!("{}/{}", phase.name, figure.name);
                }
                if figures.iter().all(|known| known.name != figure.name) {
                    figures.push(figure);
                }
            }
        }
        Self {
            scenario: begun.scenario.to_owned(),
            started_at: begun.started_at,
            command: super::facts::command(),
            seed: begun.seed,
            machine: begun.machine,
            versions: begun.versions,
            settings: begun.settings,
            verdict,
            first_violation,
            phases: findings.phases,
            figures,
            live: findings.live,
            outage: findings.outage,
            checks: findings.checks,
            audit: findings.audit,
        }
    }

    /// A figure by its name.
    pub(crate) fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }
}

impl Phase {
    /// The figures that every phase has.
    pub(super) fn figures(&self) -> Vec<Figure> {
        let Some(speed) = &self.speed else {
            return Vec::new();
        };
        let all = &speed.latency_ms.all;
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let given_up = [&self.outcomes.failed, &self.outcomes.unknown]
            .into_iter()
            .flat_map(BTreeMap::values)
            .sum::<usize>() as f64;
        let mut figures = vec![
            Figure::new("accepted_per_s", speed.accepted_per_s, "/s"),
            Figure::new("requests_per_s", speed.requests_per_s, "/s"),
            Figure::new("p50_ms", all.p50, "ms"),
            Figure::new("p90_ms", all.p90, "ms"),
            Figure::new("p99_ms", all.p99, "ms"),
            Figure::new("p99_9_ms", all.p99_9, "ms"),
            Figure::new("max_ms", all.max, "ms"),
            Figure::new("given_up", given_up, ""),
            Figure::new("harness_cpu_share", self.generator.cpu_share, ""),
        ];
        for (name, ms) in [
            ("sold_out_after_ms", speed.sold_out_after_ms),
            ("stored_after_ms", speed.stored_after_ms),
        ] {
            figures.extend(ms.map(|ms| Figure::new(name, ms, "ms")));
        }
        for (name, durations) in &speed.other_ms {
            let name = name.replace(|char: char| !char.is_ascii_alphanumeric(), "_");
            figures.push(Figure::new(format!("{name}_p50_ms"), durations.p50, "ms"));
            figures.push(Figure::new(format!("{name}_p99_ms"), durations.p99, "ms"));
        }
        for process in &self.processes {
            let name = format!("{}_cpu_us_per_accepted", process.name);
            let used = process.us_per_accepted;
            figures.extend(used.map(|used| Figure::new(name, used, "µs")));
        }
        figures
    }
}

impl Document {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It is not there, or not what this version writes.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is no document of stockade-bench", file.display()))
    }

    /// The document as text, in lines that a person can read.
    ///
    /// # Errors
    ///
    /// A number is none, so that the text could not be read again.
    pub(crate) fn json(&self) -> Result<String> {
        let text = lines(&serde_json::to_string(self)?);
        match serde_json::from_str::<Self>(&text) {
            Ok(_) => Ok(text),
            Err(error) => bail!("the document cannot be written: {error}"),
        }
    }

    /// Whether every promise was kept.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Run(run) => run.verdict,
            Self::Suite(suite) => suite.verdict,
        }
    }
}

/// Characters of a line that holds a whole object or list.
const LINE_MAX: usize = 200;

/// Breaks compact JSON into lines: what fits on one line stays on one.
fn lines(compact: &str) -> String {
    let bytes = compact.as_bytes();
    let ends = ends(bytes);
    let mut text = String::with_capacity(compact.len() * 2);
    let (mut at, mut depth, mut one_line_until) = (0, 0, 0);
    while at < bytes.len() {
        let is_one_line = at < one_line_until;
        let mut next = at + 1;
        let breaks = match bytes[at] {
            b'"' => {
                next = ends[at] + 1;
                false
            }
            b'{' | b'[' if !is_one_line => {
                if ends[at] - at <= LINE_MAX {
                    one_line_until = ends[at] + 1;
                    false
                } else {
                    depth += 1;
                    true
                }
            }
            b',' => !is_one_line,
            _ => false,
        };
        if matches!(bytes[at], b'}' | b']') && !is_one_line {
            depth -= 1;
            new_line(&mut text, depth);
        }
        text.push_str(&compact[at..next]);
        if breaks {
            new_line(&mut text, depth);
        } else if matches!(bytes[at], b',' | b':') {
            text.push(' ');
        }
        at = next;
    }
    text.push('\n');
    text
}

fn new_line(text: &mut String, depth: usize) {
    text.push('\n');
    text.extend(std::iter::repeat_n("  ", depth));
}

/// Where each string, object and list ends, by where it begins.
fn ends(json: &[u8]) -> Vec<usize> {
    let mut ends = vec![0; json.len()];
    let mut open = Vec::new();
    let mut at = 0;
    while at < json.len() {
        match json[at] {
            b'"' => {
                let begin = at;
                at += 1;
                while at < json.len() && json[at] != b'"' {
                    at += if json[at] == b'\\' { 2 } else { 1 };
                }
                ends[begin] = at;
            }
            b'{' | b'[' => open.push(at),
            b'}' | b']' => {
                if let Some(begin) = open.pop() {
                    ends[begin] = at;
                }
            }
            _ => {}
        }
        at += 1;
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_broken_into_lines_that_hold_the_same() {
        let long = "x".repeat(LINE_MAX);
        let value = serde_json::json!({
            "text": "a \" { [ , : \\",
            "rows": [{"a": 1, "b": [1, 2]}, {"a": long, "b": {}}],
            "empty": [],
        });
        let text = lines(&value.to_string());
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        assert!(
            text.contains("\n    {\"a\": 1, \"b\": [1, 2]},\n    {\n      \"a\""),
            "{text}"
        );
    }

    #[test]
    fn what_is_written_can_be_read_and_nothing_else_can() {
        let run = Run::new(
            Begun {
                scenario: "drop",
                started_at: DateTime::default(),
                seed: u64::MAX,
                machine: Machine::here(),
                versions: Versions::default(),
                settings: BTreeMap::new(),
            },
            Findings::default(),
        );
        let text = Document::Run(Box::new(run)).json().unwrap();
        let mut value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["schema"], "stockade-bench/run/1");
        assert_eq!(value["seed"], u64::MAX);
        value["seeds"] = Value::Null;
        let error = serde_json::from_value::<Document>(value).unwrap_err();
        assert!(error.to_string().contains("seeds"), "{error}");
    }

    #[test]
    fn a_goal_is_met_on_its_own_side() {
        for (op, below, at, above) in [
            (Op::AtLeast, false, true, true),
            (Op::Above, false, false, true),
            (Op::AtMost, true, true, false),
            (Op::Below, true, false, false),
        ] {
            let goal = Goal { op, value: 2.0 };
            assert_eq!(
                [1.0, 2.0, 3.0].map(|value| goal.is_met(value)),
                [below, at, above]
            );
        }
    }

    #[test]
    fn a_ratio_of_nothing_is_absent() {
        let ratio = |below| {
            Ratio::of(
                "a ÷ b",
                Term::new("a", Some(3.0), "/s"),
                Term::new("b", below, "/s"),
                Goal::at_least(0.5),
            )
        };
        assert_eq!(
            (ratio(Some(4.0)).value, ratio(Some(4.0)).met),
            (Some(0.75), Some(true))
        );
        assert_eq!((ratio(None).value, ratio(Some(0.0)).met), (None, None));
    }
}
