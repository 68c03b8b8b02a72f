//! What lies under everything: the script alone on a bare Redis, by orders per call; and how fast the
//! writer drains a journal beside `COPY` of the same rows into the same table.

use std::time::Duration;

use anyhow::{Context, Result};

use super::canonical::{SATURATING, saturate};
use super::drain::rate_of_drain;
use crate::floor::copy::Rows;
use crate::floor::script::{BareRedis, Cost};
use crate::load::crowd::Arrivals;
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Orders that are drained, and copied, in each round.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    orders: u64,
    /// Rounds; what is quoted is the median.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    rounds: u64,
}

/// Orders of one call of the script.
const TOGETHER: [usize; 4] = [1, 16, 64, 128];

/// Orders for each of them.
const SCRIPT_ORDERS: usize = 40_000;

/// Makes the run.
///
/// # Errors
///
/// The run could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    // Before the server of the run is there.
    let scripts = scripts(usize::try_from(args.rounds)?)?;
    trial::run("floor", &args.common, async |bench| {
        for figure in scripts {
            bench.figure(figure);
        }
        steps(bench, args).await
    })
}

/// The script by itself.
fn scripts(rounds: usize) -> Result<Vec<Figure>> {
    let mut redis = BareRedis::start()?;
    redis.sell(SCRIPT_ORDERS / 4, 16)?;
    let mut costs = vec![Vec::new(); TOGETHER.len()];
    for _ in 0..rounds {
        for (together, costs) in TOGETHER.iter().zip(&mut costs) {
            costs.push(redis.sell(SCRIPT_ORDERS, *together)?);
        }
    }
    let mut figures = Vec::new();
    for (together, costs) in TOGETHER.iter().zip(&costs) {
        let of = |value: fn(&Cost) -> f64| trial::median(costs.iter().map(value).collect());
        let us = of(|cost| cost.cpu.as_secs_f64() * 1e6 / count(cost));
        let per_s = of(|cost| count(cost) / cost.time.as_secs_f64());
        figures.extend([
            Figure::new(format!("script_us_per_order_at_{together}"), us, "µs"),
            Figure::new(format!("script_orders_per_s_at_{together}"), per_s, "/s"),
        ]);
    }
    Ok(figures)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(cost: &Cost) -> f64 {
    cost.orders as f64
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("orders", args.orders);
    bench.set("rounds", args.rounds);
    saturate(bench, "warm-up", 4000).await?;
    let database = bench.server.backstage.endpoints()?.database_url;
    let (mut drained, mut copied) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        let name = format!("drained {round}");
        let crowd = bench.crowd(usize::try_from(args.orders)?, Arrivals::Burst);
        let wish = Wish {
            connections: Some(SATURATING),
            patience: Duration::from_mins(5),
            looks_every: Duration::from_millis(20),
            ..Wish::new(&name, crowd, args.orders)
        };
        let trial = bench.trial_without_writer(&name, wish).await?;
        drained.push(rate_of_drain(&trial).context("the writer drained nothing")?);
        let mut rows = Rows::of(&database, args.orders).await?;
        copied.push(rows.copy().await?);
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let copied = copied
        .iter()
        .map(|copied| copied.rows as f64 / copied.time.as_secs_f64());
    let copied = trial::median(copied.collect());
    bench.figure(Figure::new("drained_per_s", trial::median(drained), "/s"));
    bench.figure(Figure::new("copied_per_s", copied, "/s"));
    Ok(())
}
