//! The run to quote. How many orders a second it accepts when as many as possible are asked of it,
//! while the writer drains and while it is paused; how long purchases take at 70 % of that, and
//! their way to PostgreSQL; and that a stock is sold to the last unit and not one more.

use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, sleep};

use crate::load::crowd::{Arrivals, Crowd};
use crate::report::{Figure, Goal, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, Trial, requests};

/// Requests in flight when as many as possible are asked.
pub(crate) const SATURATING: usize = 512;

/// Of the highest rate, what is asked in the open run.
const STEADY: f64 = 0.7;

/// Longer than the journal is kept: when Redis' memory has not shrunk for so long, it is trimmed.
const TRIMMED_AFTER: Duration = Duration::from_secs(7);

/// How long Redis may take to forget the journal.
const TRIMMED_MAX: Duration = Duration::from_secs(30);

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// A few seconds instead of a minute: for its verdict, not for its speed.
    #[arg(long)]
    pub(crate) short: bool,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("canonical", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    let seconds =
        |long: u64, short: u64| Duration::from_secs(if args.short { short } else { long });
    // Everything is warm afterwards, and it is known how much is much.
    let warm = saturate(bench, "warm-up", 4000).await?.accepted_per_s;
    let warm = saturate(bench, "warm-up 2", requests(warm, seconds(2, 1)))
        .await?
        .accepted_per_s;

    let each = requests(warm, seconds(4, 1));
    let mut rates = Vec::new();
    for n in 1..=if args.short { 1 } else { 3 } {
        let name = format!("saturated {n}");
        rates.push(saturate(bench, &name, each).await?.accepted_per_s);
    }
    rates.sort_by(f64::total_cmp);
    let highest = rates[rates.len() / 2];
    bench.figure(Figure::new("accepted_per_s", highest, "/s"));

    if bench.stage.is_some() {
        let name = "saturated, writer paused";
        let wish = saturating(bench, name, each);
        let paused = bench.trial_without_writer(name, wish).await?.accepted_per_s;
        bench.figure(Figure::new("accepted_per_s_writer_paused", paused, "/s"));
    }

    steady(bench, (highest * STEADY).round(), seconds(20, 2)).await?;

    // Everybody wants one more than the limit allows.
    let buyers = if args.short { 2000 } else { 10_000 };
    let crowd = Crowd {
        tries: 2,
        greedy: true,
        ..bench.crowd(buyers, Arrivals::Burst)
    };
    let stock = buyers as u64 / 5;
    let wish = Wish {
        attach_sse: true,
        ..Wish::new("Sold out", crowd, stock)
    };
    bench.trial("sold out", wish).await?;
    Ok(())
}

/// An open run at a rate.
async fn steady(bench: &mut Bench, rate: f64, time: Duration) -> Result<()> {
    let crowd = bench.crowd(requests(rate, time), Arrivals::Rate(rate));
    let stock = crowd.buyers as u64;
    let wish = Wish {
        looks_every: Duration::from_millis(5),
        ..Wish::new("Steady", crowd, stock)
    };
    let before = bench.redis_memory().await;
    let trial = bench.trial("steady", wish).await?;
    let phase = bench.phase(&trial).clone();
    if let Some(speed) = &phase.speed {
        let all = &speed.latency_ms.accepted;
        bench.figure(Figure::new("steady_per_s", rate, "/s"));
        bench.figure(Figure::new("steady_p50_ms", all.p50, "ms"));
        bench.figure(Figure::new("steady_p99_ms", all.p99, "ms"));
        bench.figure(Figure::new("steady_p99_9_ms", all.p99_9, "ms"));
        if let Some(lag) = speed.other_ms.get("201 to row") {
            let figure = Figure::new("stored_p99_ms", lag.p99, "ms");
            bench.figure(figure.with_goal(Goal::at_most(1000.0)));
        }
    }
    for process in &phase.processes {
        if let Some(us) = process.us_per_accepted {
            let name = format!("{}_us_per_accepted", process.name);
            bench.figure(Figure::new(name, us, "µs"));
        }
    }
    if let (Some(before), Some(after)) = (before, trimmed(bench).await) {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let each = (after as f64 - before as f64) / trial.crowded.accepted() as f64;
        let figure = Figure::new("redis_bytes_per_order", each, "bytes");
        bench.figure(figure.with_goal(Goal::at_most(400.0)));
    }
    Ok(())
}

/// Redis' memory once the journal is trimmed: when it has not shrunk for a while.
async fn trimmed(bench: &Bench) -> Option<u64> {
    bench.stage.as_ref()?;
    let (begun, mut least, mut since) = (Instant::now(), u64::MAX, Instant::now());
    while begun.elapsed() < TRIMMED_MAX && since.elapsed() < TRIMMED_AFTER {
        let now = bench.redis_memory().await?;
        if now < least - least / 200 {
            since = Instant::now();
        }
        least = least.min(now);
        sleep(Duration::from_millis(250)).await;
    }
    Some(least)
}

/// Everybody asks at once, over so many connections that the server is never idle.
pub(crate) fn saturating(bench: &mut Bench, name: &str, buyers: usize) -> Wish {
    let crowd = bench.crowd(buyers, Arrivals::Burst);
    let stock = crowd.buyers as u64;
    Wish {
        connections: Some(SATURATING.min(buyers)),
        // The last of them waits until all others are served.
        patience: Duration::from_mins(5),
        ..Wish::new(name, crowd, stock)
    }
}

pub(crate) async fn saturate(bench: &mut Bench, name: &str, buyers: usize) -> Result<Trial> {
    let wish = saturating(bench, name, buyers);
    bench.trial(name, wish).await
}
