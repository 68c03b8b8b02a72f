//! What a purchase costs in a round of a thousand units, of a hundred thousand, and of ten million:
//! measured where the round is fullest, at the end.

use std::time::Duration;

use anyhow::Result;

use super::canonical::{SATURATING, saturate};
use crate::load::crowd::{Arrivals, Crowd};
use crate::report::{Figure, Goal, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, Trial};
use crate::usage::Family;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Orders of the largest round; it has ten million units.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10..=10_000_000))]
    pub(crate) orders: u64,
}

/// Units of the largest round.
const LARGEST: u64 = 10_000_000;

/// Orders at the end of a round that are looked at.
const TAIL: usize = 40_000;

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("scale", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("orders", args.orders);
    saturate(bench, "warm-up", 20_000).await?;
    // One round of a thousand is over too soon to be measured: many, one after the other, are not.
    let small = Crowd {
        sales: TAIL / 1000,
        in_turn: true,
        ..bench.crowd(TAIL, Arrivals::Burst)
    };
    let small = round(bench, "1,000 units", small, 1000).await?;
    let middle = bench.crowd(100_000, Arrivals::Burst);
    let middle = round(bench, "100,000 units", middle, 100_000).await?;
    let large = Crowd {
        quantity: LARGEST / args.orders,
        ..bench.crowd(usize::try_from(args.orders)?, Arrivals::Burst)
    };
    let large = round(bench, "10,000,000 units", large, LARGEST).await?;
    for (units, cost) in [("1e3", small), ("1e5", middle), ("1e7", large)] {
        bench.figure(Figure::new(
            format!("accepted_per_s_at_{units}"),
            cost.per_s,
            "/s",
        ));
        if let Some(us) = cost.redis_us {
            bench.figure(Figure::new(
                format!("redis_us_per_order_at_{units}"),
                us,
                "µs",
            ));
        }
    }
    if let (Some(small), Some(large)) = (small.redis_us, large.redis_us) {
        let growth = Figure::new("cost_growth", large / small, "×");
        bench.figure(growth.with_goal(Goal::at_most(1.5)));
    }
    Ok(())
}

/// What an order cost at the end of a round.
#[derive(Clone, Copy)]
struct Cost {
    per_s: f64,
    /// Processor time of Redis.
    redis_us: Option<f64>,
}

async fn round(bench: &mut Bench, name: &str, crowd: Crowd, stock: u64) -> Result<Cost> {
    let wish = Wish {
        limit: crowd.quantity,
        connections: Some(SATURATING),
        opens_in: Duration::from_secs(3),
        patience: Duration::from_mins(5),
        looks_every: Duration::from_millis(100),
        ..Wish::new(name, crowd, stock)
    };
    let trial = bench.trial(name, wish).await?;
    Ok(cost(&trial))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn cost(trial: &Trial) -> Cost {
    let mut accepted: Vec<Duration> = trial.crowded.acceptances().collect();
    accepted.sort_unstable();
    let until = |instant: &Duration| accepted.partition_point(|answered| answered <= instant);
    let before_tail = accepted.len().saturating_sub(TAIL);
    let looks = &trial.crowded.looks;
    // The last look at which the tail was still to come.
    let from = looks
        .iter()
        .rfind(|(instant, _)| until(instant) <= before_tail);
    let (Some((from, used)), Some((to, used_at_end))) = (from.or(looks.first()), looks.last())
    else {
        return Cost {
            per_s: trial.accepted_per_s,
            redis_us: None,
        };
    };
    let orders = (until(to) - until(from)).max(1) as f64;
    let cpu = |look: &crate::usage::Look| look.get(&Family::Redis).map(|usage| usage.cpu);
    let redis = cpu(used_at_end).zip(cpu(used));
    Cost {
        per_s: orders / to.saturating_sub(*from).as_secs_f64().max(1e-6),
        redis_us: redis.map(|(end, begin)| end.saturating_sub(begin).as_secs_f64() * 1e6 / orders),
    }
}
