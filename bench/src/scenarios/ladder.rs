//! Rates that grow step by step until the server no longer keeps up, then 80 % of the last one that
//! it did.

use std::time::Duration;

use anyhow::{Result, bail};

use super::canonical::saturate;
use crate::load::crowd::Arrivals;
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, Trial, requests};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The first rate, in purchases per second.
    #[arg(long, default_value_t = 1000.0)]
    pub(crate) from: f64,
    /// By how much each rate is higher than the one before.
    #[arg(long, default_value_t = 1.3)]
    pub(crate) factor: f64,
    /// How long each of them is kept.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) each: Duration,
    /// The knee: p99 above this, in milliseconds …
    #[arg(long, default_value_t = 100.0)]
    pub(crate) p99_ms: f64,
    /// … or less than this share of the rate is accepted.
    #[arg(long, default_value_t = 0.95)]
    pub(crate) achieved: f64,
}

/// Steps at most.
const STEPS_MAX: usize = 40;

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("ladder", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    if args.factor <= 1.0 || args.from <= 0.0 {
        bail!("a ladder goes up: --from is above 0 and --factor above 1");
    }
    saturate(bench, "warm-up", 4000).await?;
    let (mut rate, mut kept) = (args.from, None);
    for _ in 0..STEPS_MAX {
        let trial = step(bench, &format!("{rate:.0}/s"), rate, args.each).await?;
        if !keeps_up(bench, &trial, rate, args) {
            break;
        }
        kept = Some(rate);
        rate = (rate * args.factor).round();
    }
    let Some(knee) = kept else {
        bail!("the first step is too high already: begin lower with --from");
    };
    bench.figure(Figure::new("knee_per_s", knee, "/s"));
    let trial = step(
        bench,
        "80 % of the knee",
        (knee * 0.8).round(),
        args.each * 2,
    )
    .await?;
    let p99 = p99(bench, &trial);
    bench.figure(Figure::new("p99_at_80_ms", p99, "ms"));
    Ok(())
}

async fn step(bench: &mut Bench, name: &str, rate: f64, time: Duration) -> Result<Trial> {
    let crowd = bench.crowd(requests(rate, time), Arrivals::Rate(rate));
    let stock = crowd.buyers as u64;
    bench.trial(name, Wish::new(name, crowd, stock)).await
}

fn p99(bench: &Bench, trial: &Trial) -> f64 {
    let speed = bench.phase(trial).speed.as_ref();
    speed.map_or(f64::INFINITY, |speed| speed.latency_ms.all.p99)
}

fn keeps_up(bench: &Bench, trial: &Trial, rate: f64, args: &Args) -> bool {
    p99(bench, trial) <= args.p99_ms && trial.accepted_per_s >= rate * args.achieved
}
