//! Whether one build is faster than another: figures of both with a confidence interval.
//!
//! With several runs on each side the runs are drawn anew (bootstrap), which includes what differs
//! from run to run. With one run on a side its intervals are drawn anew, in blocks, since
//! neighbours resemble each other; that knows nothing of what another run would have been like,
//! and the comparison says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};

use anyhow::{Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::document::{Figure, Interval, Machine, Op, Phase, Run, Verdict};
use super::text::number;

/// Times that everything is drawn anew.
const DRAWS: usize = 4000;

/// The same runs give the same intervals.
const SEED: u64 = 0x570c_4ade;

/// Of 100 intervals, those that are to contain the true ratio.
const CONFIDENCE: f64 = 0.95;

/// Settings that differ from run to run and mean nothing.
const INCIDENTAL: [&str; 4] = ["server", "sale_id", "opens_at", "data_dir"];

/// Below so many intervals a run says nothing about its own spread.
const INTERVALS_MIN: usize = 8;

/// Two sets of runs of one scenario.
#[derive(Debug)]
pub(crate) struct Comparison {
    scenario: String,
    runs: (usize, usize),
    method: Method,
    pub(crate) rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Runs,
    Intervals,
}

/// One figure on both sides.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    unit: String,
    medians: (f64, f64),
    /// New ÷ old.
    pub(crate) ratio: f64,
    /// Of the ratio.
    pub(crate) interval: Option<(f64, f64)>,
    pub(crate) change: Change,
}

/// What the interval allows to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Better,
    Worse,
    /// It differs, and nobody said which way is better.
    Different,
    None,
    /// There is no interval to say it from.
    Unclear,
}

impl Change {
    fn word(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "WORSE",
            Self::Different => "different",
            Self::None => "no difference",
            Self::Unclear => "unclear",
        }
    }
}

/// Whether two sets of runs can be compared at all.
///
/// # Errors
///
/// One broke a promise; or scenario, settings or machine differ.
pub(crate) fn comparable(old: &[Run], new: &[Run]) -> Result<()> {
    let Some(first) = old.first() else {
        bail!("there is nothing to compare");
    };
    for run in old.iter().chain(new) {
        if run.scenario != first.scenario {
            bail!("scenarios differ: {} and {}", first.scenario, run.scenario);
        }
        if let Some(what) = different(first, run) {
            bail!("{what}; with --force they are compared all the same");
        }
    }
    Ok(())
}

/// The first thing that makes a comparison of two runs unfair.
fn different(one: &Run, other: &Run) -> Option<String> {
    let machine = |run: &Run| Machine {
        load_before: None,
        ..run.machine.clone()
    };
    if machine(one) != machine(other) {
        return Some(format!(
            "machines differ: {:?} and {:?}",
            machine(one),
            machine(other)
        ));
    }
    let names: BTreeSet<&String> = one.settings.keys().chain(other.settings.keys()).collect();
    let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    names
        .into_iter()
        .filter(|name| !INCIDENTAL.contains(&name.as_str()))
        .find(|name| one.settings.get(*name) != other.settings.get(*name))
        .map(|name| {
            format!(
                "settings differ: {name} is {} and {}",
                show(one.settings.get(name)),
                show(other.settings.get(name))
            )
        })
}

/// Compares every figure that all runs have; with those of single phases, if asked to.
///
/// # Errors
///
/// A run broke a promise: then it has no figures.
pub(crate) fn compare(old: &[Run], new: &[Run], with_phases: bool) -> Result<Comparison> {
    let mut runs = old.iter().chain(new);
    if let Some(broken) = runs.find(|run| run.verdict == Verdict::Fail) {
        bail!(
            "a run of {} broke a promise and has no figures: {}",
            broken.scenario,
            broken.first_violation.as_deref().unwrap_or("")
        );
    }
    let method = if old.len() > 1 && new.len() > 1 {
        Method::Runs
    } else {
        Method::Intervals
    };
    let figures = old.first().map(|run| run.figures.as_slice());
    let rows = figures
        .unwrap_or_default()
        .iter()
        .filter(|figure| with_phases || figure.is_of_the_run())
        .filter_map(|figure| Row::of(figure, old, new, method))
        .collect();
    Ok(Comparison {
        scenario: old
            .first()
            .map_or(String::new(), |run| run.scenario.clone()),
        runs: (old.len(), new.len()),
        method,
        rows,
    })
}

impl Row {
    fn of(figure: &Figure, old: &[Run], new: &[Run], method: Method) -> Option<Self> {
        let values = |runs: &[Run]| -> Option<Vec<f64>> {
            let value = |run: &Run| run.figure(&figure.name).map(|figure| figure.value);
            runs.iter().map(value).collect()
        };
        let (mut before, mut after) = (values(old)?, values(new)?);
        let medians = (median(&mut before), median(&mut after));
        if medians.0 <= 0.0 {
            // A ratio to nothing is none; equal zeros are no difference.
            let change = if medians == (0.0, 0.0) {
                Change::None
            } else {
                Change::Unclear
            };
            return Some(Self {
                name: figure.name.clone(),
                unit: figure.unit.clone(),
                medians,
                ratio: 1.0,
                interval: None,
                change,
            });
        }
        let ratio = medians.1 / medians.0;
        let interval = match method {
            Method::Runs => Some(over_runs(&before, &after)),
            Method::Intervals => over_intervals(&figure.name, old, new).map(|(low, high)| {
                // Drawn from the parts of the runs, laid around the ratio of the whole runs.
                (ratio * low, ratio * high)
            }),
        };
        Some(Self {
            change: change(figure, ratio, interval),
            name: figure.name.clone(),
            unit: figure.unit.clone(),
            medians,
            ratio,
            interval,
        })
    }

    /// Whether it got worse for certain, and by more than this share.
    pub(crate) fn is_worse_by(&self, share: f64) -> bool {
        self.change == Change::Worse && (self.ratio > 1.0 + share || self.ratio < 1.0 - share)
    }
}

/// What can be said of a ratio.
fn change(figure: &Figure, ratio: f64, interval: Option<(f64, f64)>) -> Change {
    let Some((low, high)) = interval else {
        return Change::Unclear;
    };
    if low <= 1.0 && high >= 1.0 {
        return Change::None;
    }
    match is_better_when_higher(figure) {
        Some(higher) if higher == (ratio > 1.0) => Change::Better,
        Some(_) => Change::Worse,
        None => Change::Different,
    }
}

/// Which way is better, as far as the figure itself says.
fn is_better_when_higher(figure: &Figure) -> Option<bool> {
    if let Some(goal) = &figure.goal {
        return Some(matches!(goal.op, Op::AtLeast | Op::Above));
    }
    match figure.unit.as_str() {
        "/s" => Some(true),
        "ms" | "µs" | "bytes" => Some(false),
        _ if figure.name.ends_with("given_up") => Some(false),
        _ => None,
    }
}

/// The middle of some values, which it sorts.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values {
        [] => 0.0,
        _ if values.len() % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The interval of the ratio of medians, with the runs of each side drawn anew.
fn over_runs(before: &[f64], after: &[f64]) -> (f64, f64) {
    let mut random = StdRng::seed_from_u64(SEED);
    let mut draw = |values: &[f64]| {
        let mut drawn: Vec<f64> = (0..values.len())
            .map(|_| values[random.random_range(0..values.len())])
            .collect();
        median(&mut drawn)
    };
    let ratios = (0..DRAWS).map(|_| {
        let before = draw(before).max(f64::MIN_POSITIVE);
        draw(after) / before
    });
    middle(ratios.collect())
}

/// The interval of the ratio as a multiple of itself, with the intervals of the runs drawn anew;
/// nothing for a figure that intervals do not have.
fn over_intervals(name: &str, old: &[Run], new: &[Run]) -> Option<(f64, f64)> {
    let (old, new) = (parts(name, old)?, parts(name, new)?);
    let figure = if name.ends_with("p50_ms") {
        middle_part
    } else {
        mean
    };
    let whole = figure(&new) / figure(&old);
    let mut random = StdRng::seed_from_u64(SEED);
    let ratios = (0..DRAWS).map(|_| {
        let old = figure(&blocks(&old, &mut random)).max(f64::MIN_POSITIVE);
        figure(&blocks(&new, &mut random)) / old / whole
    });
    let (low, high) = middle(ratios.collect());
    (low.is_finite() && high.is_finite()).then_some((low, high))
}

/// A figure in each interval, with the weight of the interval.
fn parts(name: &str, runs: &[Run]) -> Option<Vec<(f64, f64)>> {
    let (phase, name) = name
        .rsplit_once('/')
        .map_or((None, name), |(phase, name)| (Some(phase), name));
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let count = |count: u64| count as f64;
    let ended = |row: &Interval| row.accepted + row.refused.values().sum::<u64>() + row.failed;
    let latency = |ms: Option<f64>, row: &Interval| ms.map(|ms| (ms, count(ended(row))));
    let part = |row: &Interval| match name {
        "accepted_per_s" => Some((count(row.accepted), 1.0)),
        "requests_per_s" => Some((count(ended(row)), 1.0)),
        "p50_ms" => latency(row.p50_ms, row),
        "p99_ms" => latency(row.p99_ms, row),
        _ => None,
    };
    let mut parts = Vec::new();
    for run in runs {
        // The scenario says what a figure of the whole run is made of; its phases do not.
        if phase.is_none() && run.phases.len() != 1 {
            return None;
        }
        let is_it = |candidate: &&Phase| phase.is_none_or(|phase| candidate.name == phase);
        let speed = run.phases.iter().find(is_it)?.speed.as_ref()?;
        let rows = &speed.series.rows;
        // The last interval is cut off somewhere.
        parts.extend(rows[..rows.len().saturating_sub(1)].iter().filter_map(part));
    }
    (parts.len() >= INTERVALS_MIN && mean(&parts) > 0.0).then_some(parts)
}

fn mean(parts: &[(f64, f64)]) -> f64 {
    let (sum, weight) = parts
        .iter()
        .fold((0.0, 0.0), |(sum, all), (value, weight)| {
            (sum + value * weight, all + weight)
        });
    if weight > 0.0 { sum / weight } else { 0.0 }
}

/// The value that half of the weight does not exceed.
fn middle_part(parts: &[(f64, f64)]) -> f64 {
    let mut parts = parts.to_vec();
    parts.sort_by(|one, other| one.0.total_cmp(&other.0));
    let half = parts.iter().map(|(_, weight)| weight).sum::<f64>() / 2.0;
    let mut seen = 0.0;
    let reaches_half = |(_, weight): &&(f64, f64)| {
        seen += weight;
        seen >= half
    };
    parts
        .iter()
        .find(reaches_half)
        .map_or(0.0, |(value, _)| *value)
}

/// As many parts as there are, drawn in blocks of neighbours.
fn blocks(parts: &[(f64, f64)], random: &mut StdRng) -> Vec<(f64, f64)> {
    // The usual length: the cube root of how many there are.
    let length = (1..=parts.len()).find(|n| n * n * n >= parts.len());
    let length = length.unwrap_or(1);
    let mut drawn = Vec::with_capacity(parts.len() + length);
    while drawn.len() < parts.len() {
        let from = random.random_range(0..parts.len());
        // Around the end, lest the parts there are drawn less often.
        drawn.extend((from..from + length).map(|n| parts[n % parts.len()]));
    }
    drawn.truncate(parts.len());
    drawn
}

/// Between which values most of them lie.
fn middle(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a few thousand"
        )]
        let index = ((values.len() - 1) as f64 * share).round() as usize;
        values[index]
    };
    let outside = (1.0 - CONFIDENCE) / 2.0;
    (at(outside), at(1.0 - outside))
}

/// The runs of each scenario, in the order of their names.
pub(crate) fn by_scenario(runs: Vec<Run>) -> BTreeMap<String, Vec<Run>> {
    let mut scenarios: BTreeMap<String, Vec<Run>> = BTreeMap::new();
    for run in runs {
        scenarios.entry(run.scenario.clone()).or_default().push(run);
    }
    scenarios
}

impl Display for Comparison {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (old, new) = self.runs;
        let from = match self.method {
            Method::Runs => "drawing the runs anew",
            Method::Intervals => {
                "drawing parts of the runs anew: what differs from run to run is not in it. \
                 Give several runs of each for that."
            }
        };
        writeln!(f, "  {}: {old} → {new} runs\n", self.scenario)?;
        let name = |row: &Row| format!("{} {}", row.name, row.unit);
        let widths = self.rows.iter().map(|row| name(row).chars().count());
        let width = widths.max().unwrap_or(0).max(20);
        writeln!(
            f,
            "  {:<width$}{:>12}{:>12}{:>9}  95 % interval",
            "figure (medians)", "old", "new", "ratio"
        )?;
        for row in &self.rows {
            let interval = row.interval.map_or("–".to_owned(), |(low, high)| {
                format!("{low:.3} … {high:.3}")
            });
            let name = name(row);
            writeln!(
                f,
                "  {name:<width$}{:>12}{:>12}{:>9.3}  {interval:<18}{}",
                number(row.medians.0),
                number(row.medians.1),
                row.ratio,
                row.change.word()
            )?;
        }
        writeln!(
            f,
            "\n  95 % intervals from {from}\n  Of 20 figures that are the same, one seems different by \
             chance."
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::document::Goal;
    use crate::report::sample;

    fn runs(accepted: &[f64]) -> Vec<Run> {
        let run = |value: &f64| {
            let mut run = sample::run(3);
            run.figures = vec![
                Figure::new("accepted_per_s", *value, "/s"),
                Figure::new("p99_ms", 1e6 / value, "ms"),
            ];
            run
        };
        accepted.iter().map(run).collect()
    }

    fn row<'a>(comparison: &'a Comparison, name: &str) -> &'a Row {
        comparison.rows.iter().find(|row| row.name == name).unwrap()
    }

    #[test]
    fn a_clear_difference_is_seen_on_the_right_side() {
        let old = runs(&[1000.0, 1010.0, 990.0, 1005.0, 995.0]);
        let new = runs(&[1200.0, 1210.0, 1190.0, 1205.0, 1195.0]);
        let comparison = compare(&old, &new, false).unwrap();
        let accepted = row(&comparison, "accepted_per_s");
        assert!((accepted.ratio - 1.2).abs() < 1e-9);
        let (low, high) = accepted.interval.unwrap();
        assert!((1.17..=1.2).contains(&low), "{low}");
        assert!((1.2..1.23).contains(&high), "{high}");
        assert_eq!(accepted.change, Change::Better);
        assert_eq!(row(&comparison, "p99_ms").change, Change::Better);
        let back = compare(&new, &old, false).unwrap();
        assert!(back.rows.iter().all(|row| row.change == Change::Worse));
        assert!(
            back.rows
                .iter()
                .all(|row| row.is_worse_by(0.05) && !row.is_worse_by(0.25))
        );
    }

    #[test]
    fn noise_is_no_difference() {
        let old = runs(&[1000.0, 1100.0, 900.0, 1050.0, 950.0]);
        let new = runs(&[1010.0, 1090.0, 920.0, 1040.0, 960.0]);
        let comparison = compare(&old, &new, false).unwrap();
        assert!(comparison.rows.iter().all(|row| row.change == Change::None));
        assert!(!comparison.rows.iter().any(|row| row.is_worse_by(0.0)));
    }

    #[test]
    fn the_same_runs_give_the_same_intervals() {
        let (old, new) = (runs(&[1.0, 2.0, 4.0]), runs(&[2.0, 3.0, 5.0]));
        let interval = || row(&compare(&old, &new, false).unwrap(), "p99_ms").interval;
        assert_eq!(interval(), interval());
    }

    #[test]
    fn single_runs_are_compared_by_their_intervals_and_it_says_so() {
        let (old, new) = ([sample::run(3)], [sample::run(4)]);
        let comparison = compare(&old, &new, false).unwrap();
        assert!(comparison.to_string().contains("several runs of each"));
        let p50 = row(&comparison, "p50_ms");
        let (low, high) = p50.interval.unwrap();
        assert!(low < p50.ratio && p50.ratio < high, "{p50:?}");
        assert_eq!(p50.change, Change::None, "{p50:?}");
        // Nothing within a run says how far its maximum would vary.
        assert_eq!(row(&comparison, "max_ms").change, Change::Unclear);

        let mut slow = sample::run(4);
        let speed = slow.phases[0].speed.as_mut().unwrap();
        for row in &mut speed.series.rows {
            row.p50_ms = row.p50_ms.map(|ms| ms * 2.0);
        }
        for figure in &mut slow.figures {
            if figure.name == "p50_ms" {
                figure.value *= 2.0;
            }
        }
        let comparison = compare(&old, &[slow], false).unwrap();
        assert!(row(&comparison, "p50_ms").is_worse_by(0.05));
    }

    #[test]
    fn a_figure_of_a_whole_run_has_no_intervals_of_a_single_phase() {
        let runs = || {
            let mut run = sample::ladder();
            run.figures.push(Figure::new("p50_ms", 3.0, "ms"));
            [run]
        };
        let comparison = compare(&runs(), &runs(), true).unwrap();
        assert_eq!(row(&comparison, "p50_ms").change, Change::Unclear);
        assert_eq!(row(&comparison, "3,000/s/p50_ms").change, Change::None);
        let short = compare(&runs(), &runs(), false).unwrap();
        assert!(short.rows.iter().all(|row| !row.name.contains('/')));
    }

    #[test]
    fn what_is_not_alike_is_not_compared() {
        let old = [sample::run(3)];
        comparable(&old, &[sample::run(4)]).unwrap();
        let refused = |change: fn(&mut Run)| {
            let mut run = sample::run(4);
            change(&mut run);
            comparable(&old, &[run]).unwrap_err().to_string()
        };
        let stock = refused(|run| {
            run.settings.insert("stock".to_owned(), 7.into());
        });
        assert!(
            stock.starts_with("settings differ: stock is 6000 and 7"),
            "{stock}"
        );
        assert!(refused(|run| run.machine.cores = 64).contains("machines differ"));
        assert!(refused(|run| run.scenario = "herd".to_owned()).contains("scenarios differ"));
        let mut run = sample::run(4);
        run.settings.insert("server".to_owned(), "elsewhere".into());
        run.machine.load_before = Some(3.0);
        comparable(&old, &[run]).unwrap();
        let error = compare(&old, &[sample::broken()], false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("oversold"), "{error}");
    }

    #[test]
    fn a_goal_says_which_way_is_better() {
        let share = Figure::new("share", 0.5, "");
        assert_eq!(change(&share, 1.1, Some((1.05, 1.2))), Change::Different);
        let share = share.with_goal(Goal::at_most(0.4));
        assert_eq!(change(&share, 1.1, Some((1.05, 1.2))), Change::Worse);
        assert_eq!(change(&share, 1.1, None), Change::Unclear);
    }

    #[test]
    fn medians_and_ends_of_intervals_are_exact() {
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&mut [4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        let (low, high) = middle((0..=1000).map(f64::from).collect());
        assert!((low - 25.0).abs() < 1e-9 && (high - 975.0).abs() < 1e-9);
    }
}
