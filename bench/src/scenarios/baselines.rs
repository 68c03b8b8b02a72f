//! Stockade beside the designs that it is compared with: the same client, requests, stores and machine,
//! in short rounds whose order is turned round each time, so that whatever drifts meets all of them.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::time::sleep;
use uuid::Uuid;

use super::canonical::{SATURATING, saturate, saturating};
use crate::baseline::{self, Baseline, CHECK_STOCK, Design};
use crate::clock;
use crate::load::crowd::Arrivals;
use crate::load::flood::{Flood, Flooded};
use crate::load::sender::{Load, Requests};
use crate::load::tokens::Signer;
use crate::report::{Figure, Generator, Offered, Phase, Process, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, median, requests};
use crate::usage::{Family, Look};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Only these designs beside Stockade.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub(crate) designs: Vec<Design>,
    /// Rounds, each with every design; what is quoted is the median.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    pub(crate) rounds: u64,
    /// How long each design is asked for all it can in one round, about.
    #[arg(long = "for", default_value = "3s", value_parser = humantime::parse_duration)]
    pub(crate) lasts: Duration,
}

/// Requests of a warm-up, from which the rate is learnt.
const WARM_UP: usize = 4000;

/// Refusals are cheaper than acceptances by about this much.
const CHEAPER: f64 = 2.0;

/// Units of the sale that refuses.
const SOON_GONE: u64 = 500;

/// How long a design may take to store what it accepted, before the next one begins.
const STORED_MAX: Duration = Duration::from_mins(3);

/// Between two looks at that: they cost the database something.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Everything that takes its turn in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Stockade,
    WriterPaused,
    SoldOut,
    Other(usize),
}

/// Numbers of each round, by name.
#[derive(Default)]
struct Numbers(BTreeMap<String, (Vec<f64>, &'static str)>);

impl Numbers {
    fn add(&mut self, name: &str, value: f64, unit: &'static str) {
        let (values, _) = self.0.entry(name.to_owned()).or_insert((Vec::new(), unit));
        values.push(value);
    }

    /// The median of each.
    fn figures(self) -> impl Iterator<Item = Figure> {
        let numbers = self.0.into_iter();
        numbers.map(|(name, (values, unit))| Figure::new(name, median(values), unit))
    }
}

/// Makes the run.
///
/// # Errors
///
/// The run could not be made, or a design does not sell as it should.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("baselines", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("rounds", args.rounds);
    bench.set("for_ms", json!(args.lasts.as_millis()));
    // Its stores are the others', too.
    bench.stage()?;
    let endpoints = bench.server.backstage.endpoints()?;
    let secret = bench.server.backstage.secret()?;
    let mut others = Vec::new();
    let chosen = |design: &Design| args.designs.is_empty() || args.designs.contains(design);
    for design in Design::ALL.into_iter().filter(chosen) {
        match Baseline::start(design, &endpoints, &secret).await {
            Ok(baseline) => others.push((baseline, 0.0)),
            Err(error) => skip(bench, design, &error),
        }
    }
    for (baseline, rate) in &mut others {
        if baseline.design.sells() {
            check(bench, baseline, &secret).await?;
        }
        let warm = flood(bench, baseline, &secret, baseline.sale, WARM_UP, WARM_UP).await?;
        *rate = per_s(&warm);
        // The first of them only made it fast.
        let count = requests(*rate, args.lasts / 3);
        let warm = flood(bench, baseline, &secret, baseline.sale, count, count).await?;
        *rate = per_s(&warm);
        if baseline.design.sells() {
            stored(baseline, baseline.sale, WARM_UP + count).await?;
        }
    }
    let warm = saturate(bench, "warm-up", WARM_UP).await?.accepted_per_s;
    let count = requests(warm, args.lasts / 3);
    let warm = saturate(bench, "warm-up 2", count).await?.accepted_per_s;

    let mut turns = vec![Turn::Stockade, Turn::WriterPaused, Turn::SoldOut];
    turns.extend((0..others.len()).map(Turn::Other));
    let mut numbers = Numbers::default();
    for round in 1..=args.rounds {
        for turn in &turns {
            match turn {
                Turn::Stockade => {
                    let count = requests(warm, args.lasts);
                    let name = format!("stockade {round}");
                    let trial = saturate(bench, &name, count).await?;
                    numbers.add("stockade_per_s", trial.accepted_per_s, "/s");
                    let phase = bench.phase(&trial).clone();
                    used(&mut numbers, "stockade", &phase);
                    if let Some(stored) = trial.crowded.stored_after() {
                        numbers.add("stockade_stored_per_s", over(count, stored), "/s");
                    }
                }
                Turn::WriterPaused => {
                    let name = format!("stockade, writer paused {round}");
                    let wish = saturating(bench, &name, requests(warm, args.lasts));
                    let trial = bench.trial_without_writer(&name, wish).await?;
                    numbers.add("stockade_writer_paused_per_s", trial.accepted_per_s, "/s");
                }
                Turn::SoldOut => {
                    let name = format!("stockade, sold out {round}");
                    let buyers = requests(warm * CHEAPER, args.lasts);
                    let crowd = bench.crowd(buyers, Arrivals::Burst);
                    let wish = Wish {
                        connections: Some(SATURATING),
                        patience: Duration::from_mins(5),
                        ..Wish::new(&name, crowd, SOON_GONE)
                    };
                    let trial = bench.trial(&name, wish).await?;
                    let refusals = trial.crowded.refusals_per_s("sold_out");
                    numbers.add("stockade_refusals_per_s", refusals, "/s");
                }
                Turn::Other(n) => {
                    let (baseline, rate) = &others[*n];
                    other(bench, baseline, &secret, *rate, args, round, &mut numbers).await?;
                }
            }
        }
        turns.reverse();
    }
    for figure in numbers.figures() {
        bench.figure(figure);
    }
    Ok(())
}

/// One round of another design.
async fn other(
    bench: &mut Bench,
    baseline: &Baseline,
    secret: &str,
    rate: f64,
    args: &Args,
    round: u64,
    numbers: &mut Numbers,
) -> Result<()> {
    let name = baseline.design.name();
    let figure = name.replace(' ', "_");
    let count = requests(rate, args.lasts);
    let looks = |bench: &mut Bench| -> Result<(Look, Look)> {
        let stage = bench.stage().map(|stage| stage.roots())?;
        Ok((baseline.roots.look()?, stage.look()?))
    };
    let rows = if baseline.design.sells() {
        usize::try_from(baseline.rows(baseline.sale).await?)?
    } else {
        0
    };
    let before = looks(bench)?;
    let begun = Instant::now();
    let flooded = flood(bench, baseline, secret, baseline.sale, count, count).await?;
    let after = looks(bench)?;
    numbers.add(&format!("{figure}_per_s"), per_s(&flooded), "/s");
    if baseline.design.sells() {
        stored(baseline, baseline.sale, rows + count).await?;
        let all = begun.elapsed();
        numbers.add(&format!("{figure}_stored_per_s"), over(count, all), "/s");
    }
    let offered = Offered {
        name: format!("{name} {round}"),
        arrivals: crate::report::Arrivals::Burst,
        connections: flooded.connections,
        connections_wanted: SATURATING,
        stock: None,
    };
    let generator = Generator::new(flooded.cpu, flooded.wall, bench.threads());
    let mut phase = Phase::of(offered, &flooded.records, generator)?;
    // Everything that it started is the design's own.
    let whole = |look: &Look| -> Duration { look.values().map(|usage| usage.cpu).sum() };
    let rss = before.0.len().gt(&0).then(|| {
        let usages = after.0.values();
        usages.map(|usage| usage.rss_bytes).sum()
    });
    let own = whole(&after.0).saturating_sub(whole(&before.0));
    let application = Process::new("application", own, rss, &phase.outcomes);
    phase.processes.push(application);
    for family in [Family::Redis, Family::Postgres] {
        if let (Some(before), Some(after)) = (before.1.get(&family), after.1.get(&family)) {
            let cpu = after.cpu.saturating_sub(before.cpu);
            let process = Process::new(family.name(), cpu, Some(after.rss_bytes), &phase.outcomes);
            phase.processes.push(process);
        }
    }
    used(numbers, &figure, &phase);
    bench.findings.phases.push(phase);
    Ok(())
}

/// Notes what an acceptance cost.
fn used(numbers: &mut Numbers, name: &str, phase: &Phase) {
    for process in &phase.processes {
        if let Some(us) = process.us_per_accepted {
            let figure = format!("{name}_{}_us_per_accepted", process.name);
            numbers.add(&figure, us, "µs");
        }
    }
}

/// As many requests as the design takes, from `buyers` buyers.
async fn flood(
    bench: &mut Bench,
    baseline: &Baseline,
    secret: &str,
    sale: Uuid,
    count: usize,
    buyers: usize,
) -> Result<Flooded> {
    let crowd = bench.crowd(buyers, Arrivals::Burst);
    let keys = Uuid::from_u128(rand::random()).to_string();
    let bearers = Signer::new(secret, clock::now()).buyers(&crowd.ids())?;
    send(bench, baseline, sale, count, bearers, keys).await
}

async fn send(
    bench: &Bench,
    baseline: &Baseline,
    sale: Uuid,
    count: usize,
    bearers: Vec<String>,
    keys: String,
) -> Result<Flooded> {
    let path = format!("/v1/sales/{sale}/orders");
    let buyers = bearers.len();
    let flood = Flood {
        load: Load {
            target: baseline.target.clone(),
            connections: SATURATING.min(count),
            threads: bench.threads(),
            timeout: Duration::from_secs(10),
            patience: Duration::from_mins(5),
            cuts_every: None,
            seed: 0,
        },
        requests: Requests::new(&baseline.target, [path], bearers, keys, r#"{"quantity":1}"#),
        count,
        buyers,
    };
    flood
        .run()
        .await
        .with_context(|| format!("the load on {}", baseline.design.name()))
}

/// Makes sure that a design sells exactly the stock, keeps the limit, and answers a retry as before.
async fn check(bench: &mut Bench, baseline: &Baseline, secret: &str) -> Result<()> {
    let name = baseline.design.name();
    let crowd = bench.crowd(CHECK_STOCK * 2, Arrivals::Burst);
    let keys = Uuid::from_u128(rand::random()).to_string();
    let bearers = Signer::new(secret, clock::now()).buyers(&crowd.ids())?;
    let count = CHECK_STOCK * 4;
    let sale = baseline.check_sale;
    let first = send(bench, baseline, sale, count, bearers.clone(), keys.clone()).await?;
    let again = send(bench, baseline, sale, count, bearers, keys).await?;
    baseline::check(&first.records, &again.records)
        .with_context(|| format!("{name} does not sell as it should"))?;
    stored(baseline, sale, CHECK_STOCK).await
}

/// Waits until a design has stored so many orders of a sale.
async fn stored(baseline: &Baseline, sale: Uuid, orders: usize) -> Result<()> {
    let begun = Instant::now();
    while baseline.rows(sale).await? < orders as u64 {
        ensure!(
            begun.elapsed() < STORED_MAX,
            "{} did not store what it accepted",
            baseline.design.name()
        );
        sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Goes on without a design.
fn skip(bench: &mut Bench, design: Design, reason: &anyhow::Error) {
    let name = design.name();
    let _ = writeln!(io::stderr().lock(), "{name} left out: {reason:#}");
    bench.set(&format!("without {name}"), format!("{reason:#}"));
}

fn per_s(flooded: &Flooded) -> f64 {
    over(flooded.records.len(), flooded.wall)
}

fn over(count: usize, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let count = count as f64;
    count / time.as_secs_f64().max(1e-6)
}
