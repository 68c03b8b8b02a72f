//! Documents for tests: like those of real runs, with strings that want to be markup.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use serde_json::json;

use super::document::{
    Arrivals, Begun, Figure, Findings, Generator, Goal, Machine, Outcomes, Phase, Process, Ratio,
    Run, Sample, Suite, Term, Verdict, Versions,
};
use super::measure::Offered;
use crate::load::outcome::Outcome;
use crate::load::sender::Record;
use crate::operator::{Audit, AuditCheck};
use crate::verdict::{Check, Status};

/// What a page must not believe.
pub(crate) const HOSTILE: &str = "\"'><script src=https://example.org/x.js></script>&";

/// Two seconds of 5000 purchases a second for 6000 units. The server stands still for 300 ms in
/// the middle; how long an answer takes depends on the seed.
pub(crate) fn records(seed: u64) -> Vec<Record> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..10_000)
        .map(|n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let due = Duration::from_micros(n * 200);
            let took = 500 + state % 4000 + if state.is_multiple_of(97) { 20_000 } else { 0 };
            let still = 1_000_000..1_300_000;
            let wait = if still.contains(&(n * 200)) {
                still.end - n * 200
            } else {
                0
            };
            let sent = due + Duration::from_micros(state % 300);
            let outcome = match n {
                0..6000 => Outcome::Accepted {
                    replayed: n % 2000 == 7,
                    body: Bytes::new(),
                },
                _ if n.is_multiple_of(1999) => Outcome::Unknown {
                    reason: "no answer in time".to_owned(),
                },
                _ if n.is_multiple_of(10) => Outcome::Refused {
                    code: "buyer_limit".to_owned(),
                },
                _ => Outcome::Refused {
                    code: "sold_out".to_owned(),
                },
            };
            Record {
                purchase: usize::try_from(n).unwrap(),
                due,
                first_sent: Some(sent),
                last_sent: sent,
                finished: due + Duration::from_micros(took + wait),
                retries: u32::from(n % 2000 == 7),
                outcome,
            }
        })
        .collect()
}

fn phase(name: &str, per_s: f64, seed: u64) -> Phase {
    let offered = Offered {
        name: name.to_owned(),
        arrivals: Arrivals::Rate { per_s },
        connections: 512,
        connections_wanted: 512,
        stock: Some((6000, 1)),
    };
    let (cpu, wall) = (Duration::from_millis(700), Duration::from_secs(2));
    let records = records(seed);
    let mut phase = Phase::of(offered, &records, Generator::new(cpu, wall, 1)).unwrap();
    let speed = phase.speed.as_mut().unwrap();
    speed.sold_out_after_ms = Some(1502.0);
    speed.stored_after_ms = Some(1650.0);
    phase.processes = [
        ("application", 410, 48),
        ("redis", 190, 31),
        ("postgres", 260, 160),
    ]
    .into_iter()
    .map(|(name, cpu_ms, mib)| process(name, cpu_ms, mib << 20, &phase.outcomes))
    .collect();
    phase
}

fn process(name: &str, cpu_ms: u32, rss: u64, of: &Outcomes) -> Process {
    let samples = (0..20_u32).map(|n| Sample {
        at_ms: f64::from(n) * 100.0,
        cpu_ms: f64::from(cpu_ms * n) / 20.0,
        rss_bytes: rss + u64::from(n) * 10_000,
    });
    Process {
        samples: samples.collect(),
        ..Process::new(name, Duration::from_millis(cpu_ms.into()), Some(rss), of)
    }
}

fn begun(scenario: &'static str, seed: u64) -> Begun {
    Begun {
        scenario,
        started_at: DateTime::from_timestamp_millis(1_795_000_000_000).unwrap(),
        seed,
        machine: Machine {
            cpu: format!("A processor {HOSTILE}"),
            cores: 2,
            memory_bytes: 8 << 30,
            kernel: "Linux 6.1 x86_64".to_owned(),
            load_before: Some(0.07),
        },
        versions: Versions {
            stockade: "0.1.0".to_owned(),
            commit: Some("0123456789abcdef0123456789abcdef01234567".to_owned()),
            dirty: true,
            redis: Some("7.0.15".to_owned()),
            postgres: None,
        },
        settings: BTreeMap::from([
            ("stock".to_owned(), json!(6000)),
            ("server".to_owned(), json!(HOSTILE)),
        ]),
    }
}

fn check(name: &'static str, status: Status, events: &[&str]) -> Check {
    Check {
        name: name.into(),
        status,
        expected: "6000 units".to_owned(),
        actual: "6000 units".to_owned(),
        counter_example: events.iter().map(|event| (*event).to_owned()).collect(),
    }
}

fn findings(phases: Vec<Phase>) -> Findings {
    Findings {
        phases,
        figures: vec![
            Figure::new("accepted_to_hello", 0.53, "×").with_goal(Goal::at_least(0.5)),
            Figure::new("application_cpu_to_hello", 1.8, "×").with_goal(Goal::at_most(1.6)),
        ],
        checks: vec![
            check("exactly the stock", Status::Pass, &[]),
            check("seq without gaps", Status::Pass, &[]),
            check("live stock", Status::Skipped, &[]),
        ],
        audit: Some(Audit {
            verdict: "pass".to_owned(),
            checks: vec![AuditCheck {
                name: "units".to_owned(),
                status: "pass".to_owned(),
                expected: json!(6000),
                actual: json!(6000),
            }],
        }),
        ..Findings::default()
    }
}

/// A run that kept its promises.
pub(crate) fn run(seed: u64) -> Run {
    Run::new(
        begun("canonical", seed),
        findings(vec![phase("rate", 5000.0, seed)]),
    )
}

/// One with several rates.
pub(crate) fn ladder() -> Run {
    let step = |n: u32| phase(&format!("{n},000/s"), f64::from(n) * 1000.0, n.into());
    Run::new(begun("ladder", 1), findings((3..7).map(step).collect()))
}

/// One that did not.
pub(crate) fn broken() -> Run {
    let mut findings = findings(vec![phase("rate", 5000.0, 7)]);
    let oversold = "oversold: 6001 orders for 6001 units exist";
    findings.checks[1] = check("seq without gaps", Status::Fail, &[oversold, HOSTILE]);
    Run::new(begun("canonical", 7), findings)
}

/// Two runs and a table of goals.
pub(crate) fn suite() -> Suite {
    let run = run(7);
    Suite {
        started_at: run.started_at,
        command: run.command.clone(),
        machine: run.machine.clone(),
        versions: run.versions.clone(),
        verdict: Verdict::Pass,
        goals: vec![
            Ratio::of(
                "accepted/s ÷ hello",
                Term::new("canonical", Some(5300.0), "/s"),
                Term::new("hello", Some(10_000.0), "/s"),
                Goal::at_least(0.5),
            ),
            Ratio::of(
                "CPU per order ÷ hello",
                Term::new("application", Some(16.0), "µs"),
                Term::new("hello", Some(8.0), "µs"),
                Goal::at_most(1.6),
            ),
            Ratio::plain(
                "SSE subscribers",
                Term::new(HOSTILE, None, ""),
                Goal::at_least(19_000.0),
            ),
        ],
        runs: vec![run, ladder()],
    }
}
