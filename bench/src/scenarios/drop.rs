//! `stockade-bench drop`: one sale at the running server, one crowd, one verdict.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ArgAction;
use serde_json::json;

use super::outage::{self, Effect};
use crate::clock;
use crate::load::crowd::{Arrivals, Crowd};
use crate::operator;
use crate::report::{Begun, Findings, Machine, Run, Versions, ms};
use crate::sale_run::{SaleRun, Server, Wish};
use crate::target::{Backstage, Target};
use crate::trial::{live, phase};
use crate::verdict;

/// What the run is to be like.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The server, on this machine.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The server's data directory, with its secret and the address of its database.
    /// `STOCKADE_JWT_SECRET` and `DATABASE_URL` serve where there is none.
    #[arg(long, env = "STOCKADE_DATA_DIR", default_value = ".stockade")]
    data_dir: PathBuf,
    /// People who come.
    #[arg(long, default_value_t = 10_000, value_parser = count(10_000_000))]
    buyers: u64,
    /// Units for sale.
    #[arg(long, default_value_t = 200, value_parser = count(10_000_000))]
    stock: u64,
    /// Units that each purchase asks for.
    #[arg(long, default_value_t = 1, value_parser = count(1_000_000))]
    quantity: u64,
    /// Units that one buyer may have.
    #[arg(long, default_value_t = 1, value_parser = count(1_000_000))]
    limit: u64,
    /// Purchases that each buyer tries, each with a key of its own.
    #[arg(long, default_value_t = 1, value_parser = count(1000))]
    tries: u64,
    /// Arrivals per second, on average, such as 2000/s.
    #[arg(long, value_parser = rate, conflicts_with = "burst")]
    rate: Option<f64>,
    /// Everybody at the instant of the opening; so it is without a rate.
    #[arg(long)]
    burst: bool,
    /// How long the PostgreSQL of an embedded server stands still while the crowd buys.
    #[arg(long, value_parser = humantime::parse_duration, requires = "rate")]
    outage: Option<Duration>,
    /// From the opening to the outage.
    #[arg(long, default_value = "15s", value_parser = humantime::parse_duration, requires = "outage")]
    outage_after: Duration,
    /// Kept-alive connections, and so requests in flight [default: 4096, or one per purchase].
    #[arg(long, value_parser = count(1_000_000))]
    connections: Option<u64>,
    /// Threads that drive the connections. One leaves most of a small machine to the server.
    #[arg(long, default_value_t = 1, value_parser = count(256))]
    threads: u64,
    /// From making the sale to its opening.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    opens_in: Duration,
    /// Watch the live stock from the start.
    #[arg(long, default_value_t = true, action = ArgAction::Set, value_name = "BOOL")]
    attach_sse: bool,
    /// Accepted purchases to send once more after the crowd and after the end of the sale.
    #[arg(long, default_value_t = 20)]
    retry_after_end: usize,
    /// Time for one answer.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// How long a buyer tries again while the server is away, and an operator waits for a verdict.
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    patience: Duration,
    /// Repeats the randomness of an earlier run.
    #[arg(long)]
    seed: Option<u64>,
}

/// A parser of counts from 1.
fn count(most: u64) -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=most)
}

/// Reads `2000` and `2000/s`.
fn rate(text: &str) -> Result<f64, String> {
    match text.trim_end_matches("/s").parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("a rate is a number of arrivals per second, such as 2000/s".to_owned()),
    }
}

/// Makes the run.
///
/// # Errors
///
/// The run could not be made: no server, no secret, no right to make a sale.
pub(crate) fn run(args: &Args) -> Result<Run> {
    // The crowd has threads of its own; this one watches.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(drop(args))
}

async fn drop(args: &Args) -> Result<Run> {
    let (started_at, machine) = (clock::now(), Machine::here());
    let server = Server {
        target: Target::parse(&args.url)?,
        backstage: Backstage::new(&args.data_dir),
    };
    operator::reach(&server.target).await?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let arrivals = args.rate.map_or(Arrivals::Burst, Arrivals::Rate);
    let crowd = Crowd {
        tries: usize::try_from(args.tries)?,
        quantity: args.quantity,
        ..Crowd::once(usize::try_from(args.buyers)?, arrivals, seed)
    };
    if let (Some(lasts), Some(last)) = (args.outage, crowd.plan().last())
        && last.due < args.outage_after + lasts
    {
        bail!("the crowd is over before the outage is: send more with --buyers or --tries");
    }
    let wish = Wish {
        limit: args.limit,
        connections: args.connections.map(usize::try_from).transpose()?,
        threads: usize::try_from(args.threads)?,
        timeout: args.timeout,
        patience: args.patience,
        opens_in: args.opens_in,
        attach_sse: args.attach_sse,
        replays: args.retry_after_end,
        ..Wish::new(&format!("Drop {seed}"), crowd, args.stock)
    };
    let mut run = SaleRun::prepare(&server, wish).await?;
    let settings = [
        ("server", json!(args.url)),
        ("sale_id", json!(run.sales[0])),
        ("opens_at", json!(run.opens_at)),
        ("buyers", json!(args.buyers)),
        ("tries", json!(args.tries)),
        ("stock", json!(args.stock)),
        ("quantity", json!(args.quantity)),
        ("limit", json!(args.limit)),
        ("threads", json!(args.threads)),
    ];
    let standstill = args.outage.map(|lasts| {
        let operator = run.operator.clone();
        let (opening, after) = (run.opening.into(), args.outage_after);
        outage::run(
            &server.backstage,
            operator,
            run.sales[0],
            opening,
            after,
            lasts,
        )
    });
    let standstill = async {
        match standstill {
            Some(outage) => outage.await.map(Some),
            None => Ok(None),
        }
    };
    let (mut crowded, outage) = tokio::try_join!(run.send(None), standstill)?;
    run.settle(&mut crowded).await;
    let mut phase = phase("drop", &run, &crowded)?;
    let judged = run.judge(&crowded).await?;
    if let Some(speed) = &mut phase.speed {
        speed.sold_out_after_ms = judged.sold_out_after().map(ms);
        speed.stored_after_ms = crowded.stored_after().map(ms);
    }
    let history = judged.histories.into_iter().next();
    let history = history.context("there was no sale")?;
    let findings = Findings {
        phases: vec![phase],
        figures: Vec::new(),
        checks: verdict::of_all(judged.checks),
        live: history.frames.as_deref().map(live),
        outage: outage
            .map(|outage| Effect::of(&crowded.records, &outage))
            .transpose()?,
        audit: history.audit.ok(),
    };
    let begun = Begun {
        scenario: "drop",
        started_at,
        seed,
        machine,
        versions: Versions::here(),
        settings: settings
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    };
    Ok(Run::new(begun, findings))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;
    use serde_json::Value;

    use super::*;
    use crate::report::Document;
    use crate::shop::{Faults, SECRET, Shop};
    use crate::verdict::Status;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn args(more: &[&str]) -> Args {
        Command::try_parse_from(["drop"].iter().chain(more))
            .unwrap()
            .args
    }

    /// A drop at a small shop, whose database nobody knows.
    fn drop_at(faults: Faults, more: &[&str]) -> (Run, Value) {
        let shop = Shop::start(faults);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("jwt_secret"), SECRET).unwrap();
        let args = Args {
            url: shop.url(),
            data_dir: dir.path().to_owned(),
            opens_in: Duration::from_millis(500),
            ..args(more)
        };
        let report = run(&args).unwrap();
        let json = Document::Run(Box::new(report.clone())).json().unwrap();
        let json = serde_json::from_str(&json).unwrap();
        (report, json)
    }

    fn broken(report: &Run) -> Vec<&str> {
        let failed = report
            .checks
            .iter()
            .filter(|check| check.status == Status::Fail);
        failed.map(|check| &*check.name).collect()
    }

    const CROWD: [&str; 6] = ["--buyers", "300", "--stock", "40", "--connections", "60"];

    #[test]
    fn a_sound_shop_fails_only_for_want_of_a_database() {
        let (report, json) = drop_at(Faults::default(), &CROWD);
        assert_eq!(broken(&report), ["orders in PostgreSQL"], "{report}");
        assert_eq!(
            (
                report.phases[0].outcomes.accepted,
                report.phases[0].outcomes.refused["sold_out"]
            ),
            (40, 260)
        );
        let live = report.live.as_ref().unwrap();
        assert_eq!(
            (live.first_remaining, live.last_remaining),
            (Some(40), Some(0))
        );
        assert_eq!(json["schema"], "stockade-bench/run/1");
        assert_eq!(json["verdict"], "fail");
    }

    #[test]
    fn a_shop_that_oversells_gets_no_throughput() {
        let faults = Faults {
            oversells: 1,
            ..Faults::default()
        };
        let (report, json) = drop_at(faults, &CROWD);
        let broken = broken(&report);
        assert!(broken.contains(&"exactly the stock"), "{broken:?}");
        assert!(broken.contains(&"the server's audit"), "{broken:?}");
        assert_eq!(json["phases"][0]["speed"], Value::Null);
        assert_eq!(json["figures"], json!([]));
        let text = report.to_string();
        assert!(
            text.contains("oversold: 41 orders for 41 units exist"),
            "{text}"
        );
        assert!(
            text.contains("FAIL") && !text.contains("accepted/s"),
            "{text}"
        );
    }

    #[test]
    fn limits_and_quantities_are_judged_too() {
        let more = [
            "--tries",
            "3",
            "--quantity",
            "2",
            "--limit",
            "4",
            "--rate",
            "2000/s",
        ];
        let (report, _) = drop_at(Faults::default(), &[&CROWD[..], &more].concat());
        assert_eq!(broken(&report), ["orders in PostgreSQL"], "{report}");
        assert_eq!(report.phases[0].outcomes.accepted, 20);
    }

    #[test]
    fn demand_below_the_stock_is_met_whole() {
        let more = [
            "--buyers", "20", "--tries", "3", "--stock", "100", "--limit", "2",
        ];
        let (report, _) = drop_at(Faults::default(), &more);
        assert_eq!(broken(&report), ["orders in PostgreSQL"], "{report}");
        assert_eq!(
            (
                report.phases[0].outcomes.accepted,
                report.phases[0].outcomes.refused["buyer_limit"]
            ),
            (40, 20)
        );
    }

    #[test]
    fn no_server_is_one_clear_line() {
        let mut shop = Shop::start(Faults::default());
        shop.stop();
        let args = Args {
            url: shop.url(),
            ..args(&[])
        };
        let error = run(&args).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("no server at {} — start one with `make run`", shop.url())
        );
    }

    #[test]
    fn rates_are_read_with_and_without_their_unit() {
        assert_eq!((rate("2000"), rate("12.5/s")), (Ok(2000.0), Ok(12.5)));
        for text in ["0", "-1", "fast", "inf", "NaN/s"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
