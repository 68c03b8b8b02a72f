//! Many sales that open at the same instant, each with a crowd and a stock of its own.

use anyhow::Result;

use crate::load::crowd::{Arrivals, Crowd};
use crate::report::Run;
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Sales.
    #[arg(long, default_value_t = 50)]
    pub(crate) sales: usize,
    /// People who come to each.
    #[arg(long, default_value_t = 400)]
    pub(crate) buyers: usize,
    /// Units of each.
    #[arg(long, default_value_t = 200)]
    pub(crate) stock: u64,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("many-sales", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("sales", args.sales);
    bench.set("buyers", args.buyers);
    bench.set("stock", args.stock);
    let sales = args.sales.max(1);
    let crowd = Crowd {
        sales,
        ..bench.crowd(args.buyers * sales, Arrivals::Burst)
    };
    let wish = Wish {
        connections: Some(1024),
        // The sales are made one after the other.
        opens_in: std::time::Duration::from_millis(1000 + 20 * sales as u64),
        replays: 200,
        ..Wish::new("One of many", crowd, args.stock)
    };
    bench.trial("many sales", wish).await?;
    Ok(())
}
