//! A long run at half the highest rate: whether memory grows and whether the slowest purchases get
//! slower.

use std::time::Duration;

use anyhow::Result;

use super::canonical::saturate;
use crate::load::crowd::{Arrivals, Crowd};
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, requests};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// How long.
    #[arg(long = "for", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) lasts: Duration,
    /// Of the highest rate.
    #[arg(long, default_value_t = 0.5)]
    pub(crate) share: f64,
}

/// Purchases of one buyer: so many tokens fewer to hold.
const TRIES: usize = 10;

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("soak", &args.common, async |bench| steps(bench, args).await)
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    let warm = saturate(bench, "warm-up", 4000).await?.accepted_per_s;
    let each = requests(warm, Duration::from_secs(4));
    let highest = saturate(bench, "saturated", each).await?.accepted_per_s;
    let rate = (highest * args.share).round();
    bench.figure(Figure::new("soak_per_s", rate, "/s"));
    let buyers = requests(rate, args.lasts).div_ceil(TRIES);
    let crowd = Crowd {
        tries: TRIES,
        ..bench.crowd(buyers, Arrivals::Rate(rate))
    };
    let stock = crowd.purchases() as u64;
    let wish = Wish {
        limit: TRIES as u64,
        looks_every: Duration::from_millis(100),
        ..Wish::new("Soak", crowd, stock)
    };
    let trial = bench.trial("soak", wish).await?;
    let phase = bench.phase(&trial).clone();
    for process in &phase.processes {
        // The first tenth fills buffers and pools; from there on it should stay.
        let samples = &process.samples;
        if let (Some(early), Some(late)) = (samples.get(samples.len() / 10), samples.last())
            && early.rss_bytes > 0
        {
            #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
            let growth = late.rss_bytes as f64 / early.rss_bytes as f64;
            let name = format!("{}_rss_growth", process.name);
            bench.figure(Figure::new(name, growth, "×"));
        }
    }
    // The second half beside the first.
    let latencies = |half: bool| {
        let middle = args.lasts / 2;
        let records = trial.crowded.records.iter();
        let those = records.filter(move |record| (record.due < middle) == half);
        those.map(|record| record.finished.saturating_sub(record.due))
    };
    let first = crate::report::Percentiles::of(latencies(true))?;
    let second = crate::report::Percentiles::of(latencies(false))?;
    bench.figure(Figure::new("p99_first_half_ms", first.p99, "ms"));
    bench.figure(Figure::new("p99_second_half_ms", second.p99, "ms"));
    Ok(())
}
