//! `stockade-bench drop`: one sale, one crowd, one verdict.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use chrono::{DurationRound, SecondsFormat, TimeDelta};
use clap::ArgAction;
use hyper::header::HeaderValue;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use crate::client;
use crate::clock;
use crate::crowd::{Arrivals, Crowd};
use crate::host;
use crate::operator::{self, Operator, Terms};
use crate::outage::{self, Effect};
use crate::outcome::{Next, Outcome, judge};
use crate::report::{self, Generator, Live, Outcomes, Report, SCHEMA, Setup, Speed};
use crate::sender::{Load, Pool, Record, Sending, Tally};
use crate::sse::{Frame, Subscriber};
use crate::target::{Backstage, Target};
use crate::tokens::{Role, Signer};
use crate::verdict::{self, Ending, History, Order, Purchase, Replay, Status};
use crate::witness;

/// Connections unless asked for otherwise: several thousand requests in flight.
const CONNECTIONS: usize = 4096;

/// How long the live stock may take to show its first and its last value.
const FRAME_MAX: Duration = Duration::from_secs(5);

/// Pause between two looks at the crowd, and between two tries of a single request.
const REDRAW: Duration = Duration::from_millis(50);

/// Codes of refusals that the shop may give for want of stock or room under the limit.
const FAIR_REFUSALS: [&str; 4] = ["sold_out", "insufficient", "buyer_limit", "order_limit"];

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
    /// Writes the result as JSON to this file, too.
    #[arg(long)]
    json: Option<PathBuf>,
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
pub(crate) fn run(args: &Args) -> Result<Report> {
    // The crowd has threads of its own; this one watches.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(drop(args))
}

async fn drop(args: &Args) -> Result<Report> {
    let target = Target::parse(&args.url)?;
    operator::reach(&target).await?;
    let backstage = Backstage::new(&args.data_dir);
    let seed = args.seed.unwrap_or_else(rand::random);
    let crowd = Crowd {
        buyers: usize::try_from(args.buyers)?,
        tries: usize::try_from(args.tries)?,
        quantity: args.quantity,
        arrivals: args.rate.map_or(Arrivals::Burst, Arrivals::Rate),
        seed,
    };
    let purchases = crowd.buyers * crowd.tries;
    let progress = progress(purchases)?;
    let wanted = match args.connections {
        Some(wanted) => usize::try_from(wanted)?,
        None => CONNECTIONS.min(purchases),
    };
    let load = Load {
        target: target.clone(),
        connections: wanted.min(host::connections_max()),
        threads: usize::try_from(args.threads)?,
        timeout: args.timeout,
        patience: args.patience,
        seed,
    };

    let signer = Signer::new(&backstage.secret()?, clock::now());
    let run = Uuid::from_u128(rand::random());
    let operator = Operator {
        target: target.clone(),
        bearer: signer.bearer(run, Role::Operator)?,
        patience: args.patience,
    };
    progress.set_message("signing tokens");
    let (ids, plan) = (crowd.ids(), crowd.plan());
    if let (Some(lasts), Some(last)) = (args.outage, plan.last())
        && last.due < args.outage_after + lasts
    {
        bail!("the crowd is over before the outage is: send more with --buyers or --tries");
    }
    let bearers = signer.buyers(&ids)?;
    progress.set_message("opening connections");
    let pool = Pool::open(load.clone()).await?;
    let opened = pool.opened;
    let name = format!("Drop {seed}");
    let product = operator
        .create_product(&name, &format!("product-{run}"))
        .await?;
    let opens_at = clock::now() + TimeDelta::from_std(args.opens_in)?;
    let terms = Terms {
        name,
        allocation: args.stock,
        per_buyer_limit: args.limit,
        opens_at: opens_at.duration_trunc(TimeDelta::milliseconds(1))?,
    };
    let sale = operator.create_sale(product, &terms).await?.id;
    let mut subscriber = if args.attach_sse {
        let path = format!("/v1/sales/{sale}/events").parse()?;
        let mut subscriber = Subscriber::attach(target, path);
        subscriber.wait_for(FRAME_MAX, |_| true).await;
        Some(subscriber)
    } else {
        None
    };
    let Ok(left) = (terms.opens_at - clock::now()).to_std() else {
        bail!("the sale opened before the crowd was ready: give it more time with --opens-in");
    };
    let opening = Instant::now() + left;
    let sending = Arc::new(Sending {
        path: format!("/v1/sales/{sale}/orders").parse()?,
        bearers,
        keys: (0..purchases)
            .map(|n| HeaderValue::try_from(format!("{sale}-{n}")))
            .collect::<Result<_, _>>()?,
        body: Bytes::from(format!(r#"{{"quantity":{}}}"#, args.quantity)),
        plan,
        opening,
    });

    progress.set_message("waiting for the opening");
    let tally = Arc::new(Tally::default());
    let watch = tokio::spawn(watch(progress.clone(), Arc::clone(&tally), opening));
    let opened_at = async {
        sleep_until(opening).await;
        Ok(host::cpu_time())
    };
    let sent = async {
        let records = pool.run(Arc::clone(&sending), Arc::clone(&tally)).await?;
        Ok((records, host::cpu_time(), opening.elapsed()))
    };
    let stored = async {
        // Once the last order is in, the rest of the crowd only gets refused.
        let (_, orders) = crowd.orders_expected(args.stock, args.limit, 0);
        let orders = usize::try_from(orders)?;
        while tally.accepted.load(Ordering::Relaxed) < orders && tally.ended() < purchases {
            sleep(REDRAW).await;
        }
        let audit = operator.audit(sale).await;
        let is_complete = audit.is_ok_and(|audit| audit.verdict != "pending");
        anyhow::Ok(is_complete.then(|| opening.elapsed()))
    };
    let stands_still = async {
        match args.outage {
            Some(lasts) => {
                let after = args.outage_after;
                let outage = outage::run(&backstage, &operator, sale, opening, after, lasts);
                outage.await.map(Some)
            }
            None => Ok(None),
        }
    };
    let (cpu_before, (records, cpu_after, wall), stored_after, outage) =
        tokio::try_join!(opened_at, sent, stored, stands_still)?;
    watch.abort();
    let cpu = cpu_after.saturating_sub(cpu_before);
    let generator = Generator::new(cpu, wall, load.threads);

    progress.set_message("waiting for the last frame");
    let after = operator.sale(sale).await;
    if let (Some(subscriber), Ok(after)) = (&mut subscriber, &after) {
        let last = |frame: &Frame| {
            let stock = frame.stock.as_ref();
            stock.is_ok_and(|stock| stock.remaining == after.remaining)
        };
        // What the last frame really shows is judged below.
        subscriber.wait_for(FRAME_MAX, last).await;
    }
    progress.set_message("sending accepted purchases again");
    let sample = sample(&records, args.retry_after_end);
    let mut replays = replay(&sending, &load, &sample, "after the crowd").await;
    let closed = operator.close(sale).await;
    replays.extend(replay(&sending, &load, &sample, "after the end").await);
    progress.set_message("counting");
    let audit = operator.audit(sale).await;
    let lost = records
        .iter()
        .filter(|record| is_lost(&record.outcome))
        .count();
    let history = History {
        sale,
        opens_at: terms.opens_at,
        allocation: args.stock,
        per_buyer_limit: args.limit,
        quantity: args.quantity,
        orders_expected: crowd.orders_expected(args.stock, args.limit, u64::try_from(lost)?),
        purchases: records
            .iter()
            .map(|record| purchase(record, ids[sending.plan[record.purchase].buyer]))
            .collect(),
        rows: witness::orders(&backstage, sale).await.map_err(line),
        leaderboard: operator.leaderboard(sale).await.map_err(line),
        after: after.map_err(line),
        closed: closed.map(|sale| sale.state).map_err(line),
        audit: audit.map_err(line),
        frames: subscriber.map(|subscriber| subscriber.frames()),
        replays,
    };
    progress.finish_and_clear();

    let checks = verdict::check(&history);
    let passed = checks.iter().all(|check| check.status != Status::Fail);
    let report = Report {
        schema: SCHEMA,
        verdict: if passed { "pass" } else { "fail" },
        setup: Setup {
            server: args.url.clone(),
            sale_id: sale,
            opens_at: terms.opens_at.to_rfc3339_opts(SecondsFormat::Millis, true),
            buyers: crowd.buyers,
            tries: crowd.tries,
            stock: args.stock,
            quantity: args.quantity,
            limit: args.limit,
            rate_per_s: args.rate,
            connections: opened,
            connections_wanted: wanted,
            seed,
        },
        outcomes: Outcomes::of(&records),
        speed: if passed {
            Some(Speed::of(&records, sold_out_after(&history), stored_after)?)
        } else {
            None
        },
        outage: match outage {
            Some(outage) if passed => Some(Effect::of(&records, &outage)?),
            _ => None,
        },
        live: history.frames.as_deref().map(live),
        generator,
        checks,
        audit: history.audit.ok(),
    };
    if let Some(file) = &args.json {
        fs::write(file, report::json(&report)?)
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    Ok(report)
}

/// A bar on a terminal; nothing anywhere else.
fn progress(purchases: usize) -> Result<ProgressBar> {
    let style = "{elapsed:>4} {wide_bar} {human_pos}/{human_len}  {msg}";
    let bar = ProgressBar::new(u64::try_from(purchases)?);
    bar.set_style(ProgressStyle::with_template(style)?);
    bar.enable_steady_tick(REDRAW);
    Ok(bar)
}

/// Shows how the crowd is doing, until it is stopped.
async fn watch(progress: ProgressBar, tally: Arc<Tally>, opening: Instant) {
    sleep_until(opening).await;
    loop {
        progress.set_position(u64::try_from(tally.ended()).unwrap_or(u64::MAX));
        let [accepted, refused, failed, retries] = [
            &tally.accepted,
            &tally.refused,
            &tally.failed,
            &tally.retries,
        ]
        .map(|count| count.load(Ordering::Relaxed));
        progress.set_message(format!(
            "{accepted} accepted, {refused} refused, {failed} failed, {retries} tried again"
        ));
        sleep(REDRAW).await;
    }
}

/// Whether stock and limits do not explain why there is no acceptance.
fn is_lost(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Accepted { .. } => false,
        Outcome::Refused { code } => !FAIR_REFUSALS.contains(&code.as_str()),
        Outcome::Failed { .. } | Outcome::Unknown { .. } => true,
    }
}

/// The history of one purchase, as its buyer saw it.
fn purchase(record: &Record, buyer: Uuid) -> Purchase {
    Purchase {
        buyer,
        first_sent: record.first_sent,
        finished: record.finished,
        ending: match &record.outcome {
            Outcome::Accepted { body, .. } => Ending::Accepted(
                serde_json::from_slice::<Order>(body).map_err(|error| error.to_string()),
            ),
            Outcome::Refused { code } => Ending::Refused(code.clone()),
            Outcome::Failed { reason } => Ending::Failed(reason.clone()),
            Outcome::Unknown { reason } => Ending::Unknown(reason.clone()),
        },
    }
}

/// Accepted purchases with their bodies, at most so many, spread over all of them.
fn sample(records: &[Record], most: usize) -> Vec<(usize, Bytes)> {
    let accepted: Vec<(usize, &Bytes)> = records
        .iter()
        .filter_map(|record| match &record.outcome {
            Outcome::Accepted { body, .. } => Some((record.purchase, body)),
            _ => None,
        })
        .collect();
    let step = accepted.len().div_ceil(most.max(1)).max(1);
    let chosen = accepted.into_iter().step_by(step).take(most);
    chosen
        .map(|(purchase, body)| (purchase, body.clone()))
        .collect()
}

/// Sends accepted purchases once more, with their old keys.
async fn replay(
    sending: &Sending,
    load: &Load,
    sample: &[(usize, Bytes)],
    when: &'static str,
) -> Vec<Replay> {
    let mut replays = Vec::with_capacity(sample.len());
    for (purchase, first) in sample {
        replays.push(Replay {
            purchase: *purchase,
            when,
            first: first.clone(),
            again: send_again(sending, load, *purchase).await,
        });
    }
    replays
}

/// The body of the replayed 201, or what came instead.
async fn send_again(sending: &Sending, load: &Load, purchase: usize) -> Result<Bytes, String> {
    let begun = Instant::now();
    loop {
        let request = sending.request(purchase, &load.target.host);
        let trouble = match client::call(load.target.address, request, load.timeout).await {
            Ok(answer) => match judge(answer, None) {
                Next::Done(Outcome::Accepted {
                    replayed: true,
                    body,
                }) => return Ok(body),
                Next::Done(Outcome::Accepted { .. }) => {
                    return Err("a 201 as if it were new".to_owned());
                }
                Next::Done(
                    Outcome::Refused { code: reason }
                    | Outcome::Failed { reason }
                    | Outcome::Unknown { reason },
                ) => return Err(reason),
                Next::Again { setback, .. } => setback.to_string(),
            },
            Err(error) => line(error),
        };
        if begun.elapsed() > load.patience {
            return Err(trouble);
        }
        sleep(REDRAW).await;
    }
}

/// From the opening to the acceptance of the last unit, if there is none left.
fn sold_out_after(history: &History) -> Option<Duration> {
    let orders = history
        .purchases
        .iter()
        .filter_map(|purchase| match &purchase.ending {
            Ending::Accepted(Ok(order)) => Some(order),
            _ => None,
        });
    let sold: u64 = orders.clone().map(|order| order.quantity).sum();
    let last = orders.map(|order| order.accepted_at).max()?;
    let left = history.allocation.checked_sub(sold)?;
    (left == 0).then(|| (last - history.opens_at).to_std().unwrap_or_default())
}

fn live(frames: &[Frame]) -> Live {
    let remaining = |frame: Option<&Frame>| Some(frame?.stock.as_ref().ok()?.remaining);
    Live {
        frames: frames.len(),
        first_remaining: remaining(frames.first()),
        last_remaining: remaining(frames.last()),
    }
}

/// An error with its causes in one line.
#[expect(clippy::needless_pass_by_value, reason = "it is passed to `map_err`")]
fn line(error: anyhow::Error) -> String {
    format!("{error:#}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;

    use super::*;
    use crate::shop::{Faults, SECRET, Shop};

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
    fn drop_at(faults: Faults, more: &[&str]) -> (Report, Value) {
        let shop = Shop::start(faults);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("jwt_secret"), SECRET).unwrap();
        let file = dir.path().join("out.json");
        let args = Args {
            url: shop.url(),
            data_dir: dir.path().to_owned(),
            json: Some(file.clone()),
            opens_in: Duration::from_millis(500),
            ..args(more)
        };
        let report = run(&args).unwrap();
        let json = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        (report, json)
    }

    fn broken(report: &Report) -> Vec<&'static str> {
        let failed = report
            .checks
            .iter()
            .filter(|check| check.status == Status::Fail);
        failed.map(|check| check.name).collect()
    }

    const CROWD: [&str; 6] = ["--buyers", "300", "--stock", "40", "--connections", "60"];

    #[test]
    fn a_sound_shop_fails_only_for_want_of_a_database() {
        let (report, json) = drop_at(Faults::default(), &CROWD);
        assert_eq!(broken(&report), ["orders in PostgreSQL"], "{report}");
        assert_eq!(
            (
                report.outcomes.accepted,
                report.outcomes.refused["sold_out"]
            ),
            (40, 260)
        );
        let live = report.live.as_ref().unwrap();
        assert_eq!(
            (live.first_remaining, live.last_remaining),
            (Some(40), Some(0))
        );
        assert_eq!(json["schema"], SCHEMA);
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
        assert_eq!(json["speed"], Value::Null);
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
        assert_eq!(report.outcomes.accepted, 20);
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
                report.outcomes.accepted,
                report.outcomes.refused["buyer_limit"]
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
