//! Many orders at 70 % of the highest rate while the writer drains them all the time: how far it
//! falls behind, and what it holds meanwhile. Then as many in one go from a journal that grew while
//! there was no writer.

use std::time::Duration;

use anyhow::Result;

use super::canonical::saturate;
use crate::load::crowd::{Arrivals, Crowd};
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, Trial, requests};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Orders that are drained while they come.
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) orders: usize,
    /// Orders that wait for the writer.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) backlog: usize,
    /// Of the highest rate.
    #[arg(long, default_value_t = 0.7)]
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
    trial::run("drain", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("orders", args.orders);
    bench.set("backlog", args.backlog);
    let warm = saturate(bench, "warm-up", 4000).await?.accepted_per_s;
    let each = requests(warm, Duration::from_secs(4));
    let highest = saturate(bench, "saturated", each).await?.accepted_per_s;

    let rate = (highest * args.share).round();
    let wish = wish(bench, "Drained", args.orders, Arrivals::Rate(rate));
    let trial = bench.trial("drained while it sells", wish).await?;
    bench.figure(Figure::new("drained_while_selling_per_s", rate, "/s"));
    bench.figure(Figure::new("behind_max", behind(&trial), ""));
    let phase = bench.phase(&trial).clone();
    let lag = phase.speed.as_ref();
    if let Some(lag) = lag.and_then(|speed| speed.other_ms.get("201 to row")) {
        bench.figure(Figure::new("stored_p99_ms", lag.p99, "ms"));
        bench.figure(Figure::new("stored_max_ms", lag.max, "ms"));
    }
    let writer = phase.processes.iter().find(|one| one.name == "writer");
    if let Some(samples) = writer.map(|writer| &writer.samples) {
        // The first tenth fills its buffers; from there on it should stay.
        let steady = samples.iter().skip(samples.len() / 10);
        let (least, most) = steady.fold((u64::MAX, 0), |(least, most), sample| {
            (least.min(sample.rss_bytes), most.max(sample.rss_bytes))
        });
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        for (name, bytes) in [("writer_rss_least", least), ("writer_rss_most", most)] {
            bench.figure(Figure::new(name, bytes as f64, "bytes"));
        }
    }

    if bench.stage.is_some() {
        let wish = Wish {
            connections: Some(super::canonical::SATURATING),
            ..wish_of(bench, "Backlog", args.backlog)
        };
        let trial = bench
            .trial_without_writer("drained in one go", wish)
            .await?;
        if let Some(rate) = rate_of_drain(&trial) {
            bench.figure(Figure::new("drained_per_s", rate, "/s"));
        }
    }
    Ok(())
}

fn wish_of(bench: &mut Bench, name: &str, orders: usize) -> Wish {
    wish(bench, name, orders, Arrivals::Burst)
}

fn wish(bench: &mut Bench, name: &str, orders: usize, arrivals: Arrivals) -> Wish {
    let crowd = Crowd {
        tries: TRIES,
        ..bench.crowd(orders.div_ceil(TRIES), arrivals)
    };
    let stock = crowd.purchases() as u64;
    Wish {
        limit: TRIES as u64,
        patience: Duration::from_mins(5),
        looks_every: Duration::from_millis(50),
        ..Wish::new(name, crowd, stock)
    }
}

/// The most orders that were accepted and not stored, at any look.
fn behind(trial: &Trial) -> f64 {
    let mut accepted: Vec<Duration> = trial.crowded.acceptances().collect();
    accepted.sort_unstable();
    let behind = trial.crowded.stored.iter().map(|(instant, stored)| {
        let accepted = accepted.partition_point(|answered| answered <= instant);
        (accepted as u64).saturating_sub(*stored)
    });
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let most = behind.max().unwrap_or(0) as f64;
    most
}

/// Orders stored per second between the first look that saw some and the one that saw all.
pub(crate) fn rate_of_drain(trial: &Trial) -> Option<f64> {
    let mut looks = trial
        .crowded
        .stored
        .iter()
        .filter(|(_, stored)| *stored > 0);
    let (from, first) = looks.next()?;
    let (to, last) = looks.next_back()?;
    let time = to.checked_sub(*from)?.as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let orders = (last - first) as f64;
    (time > 0.0).then(|| orders / time)
}
