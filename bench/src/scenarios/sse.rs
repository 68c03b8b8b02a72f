//! As many subscribers of one sale as files allow, while it sells at a moderate rate; then many of
//! them are cut off at once and come back.

use std::collections::BTreeMap;
use std::fs;
use std::iter::repeat_n;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;
use serde::Deserialize;
use tokio::time::sleep_until;

use crate::host;
use crate::load::audience::{Audience, Hall, Seen, epoch_us};
use crate::load::crowd::Arrivals;
use crate::load::outcome::Outcome;
use crate::load::sender::Record;
use crate::report::{Figure, Goal, Percentiles, Run, memory_bytes, ms};
use crate::sale_run::{SaleRun, Wish};
use crate::stage::Stage;
use crate::trial::{self, Bench, Common, requests};
use crate::usage::{Family, Look};
use crate::verdict::Check;

/// One in so many of the files that a process may open is left for everything else: here the
/// buyers, in the server its stores.
const LEFT: usize = 25;

/// Between the last subscriber's snapshot and the first look at the server's memory.
const SETTLES: Duration = Duration::from_secs(2);

/// From the opening until ages count.
const WARM_UP: Duration = Duration::from_secs(2);

/// How long everybody may take to subscribe, to come back, or to see the last value.
const PATIENCE: Duration = Duration::from_secs(30);

/// Purchases of so long a time belong to the storm.
const STORM: Duration = Duration::from_secs(3);

/// The harness was what was slow if its thread was this busy, or looked away for so long.
const BUSY_SHARE: f64 = 0.8;
const LOOKED_AWAY: Duration = Duration::from_millis(35);

/// The goals: subscribers on one node, bytes of the node for each, and the age of what they see.
const SUBSCRIBERS_GOAL: f64 = 19_000.0;
const BYTES_GOAL: f64 = 16_384.0;
const AGE_MS_GOAL: f64 = 350.0;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Subscribers [default: 24 for every 25 files that a process may open].
    #[arg(long)]
    pub(crate) subscribers: Option<usize>,
    /// Subscribers that are cut off at once and come back.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) storm: usize,
    /// Purchases per second, on average.
    #[arg(long, default_value_t = 200.0)]
    pub(crate) rate: f64,
    /// How long ages are measured before the storm.
    #[arg(long, default_value = "20s", value_parser = humantime::parse_duration)]
    pub(crate) lasts: Duration,
    /// From the beginning of the storm to the last purchase.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) storm_lasts: Duration,
    /// From making the sale to its opening: the time for everybody to subscribe.
    #[arg(long, default_value = "25s", value_parser = humantime::parse_duration)]
    pub(crate) opens_in: Duration,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("sse", &args.common, async |bench| steps(bench, args).await)
}

/// A look at the server, and at what the kernel keeps for all sockets of this machine.
struct Glance {
    processes: Look,
    kernel_bytes: u64,
    at: Instant,
}

impl Glance {
    fn now(stage: Option<&Stage>) -> Result<Self> {
        let roots = stage.map(Stage::roots);
        Ok(Self {
            processes: roots
                .map(|roots| roots.look())
                .transpose()?
                .unwrap_or_default(),
            kernel_bytes: kernel_bytes(),
            at: Instant::now(),
        })
    }

    fn memory(&self) -> Option<u64> {
        Some(self.processes.get(&Family::Application)?.rss_bytes)
    }

    fn cpu(&self) -> Option<Duration> {
        Some(self.processes.get(&Family::Application)?.cpu)
    }
}

/// What was seen of the audience.
struct Watched {
    opened: Seen,
    steady: Seen,
    storm: Seen,
    /// Whether everybody was there.
    all_came: bool,
    /// Until everybody was there.
    opened_after: Duration,
    all_back: bool,
    back_after: Duration,
    before: Glance,
    full: Glance,
    begin: Glance,
    end: Glance,
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    let files = host::connections_max();
    let seats = args.subscribers.unwrap_or(files - files / LEFT);
    let storm = args.storm.min(seats);
    bench.set("subscribers", seats);
    bench.set("storm", storm);
    bench.set("rate", args.rate);
    let storm_at = WARM_UP + args.lasts;
    let purchases = requests(args.rate, storm_at + args.storm_lasts);
    let crowd = bench.crowd(purchases, Arrivals::Rate(args.rate));
    let wish = Wish {
        connections: Some(64),
        opens_in: args.opens_in,
        ..Wish::new("Live stock", crowd, u64::try_from(purchases)?)
    };
    let mut run = SaleRun::prepare(&bench.server, wish).await?;
    let target = &run.server.target;
    let path = format!("/v1/sales/{}/events", run.sales[0]);
    let audience = Audience::new(target.address, &target.authority, &path, seats)?;
    let hall = Hall::open(audience)?;
    let (opening, opening_us) = (run.opening, epoch_us(run.opening));

    let stage = bench.stage.as_ref();
    let roots = stage.map(Stage::roots);
    let before = Glance::now(stage)?;
    let begun = Instant::now();
    let everybody = move |audience: &Audience| audience.watching() == seats;
    let all_came = hall
        .ask(move |audience| audience.follow(PATIENCE, everybody))
        .await?;
    let opened_after = begun.elapsed();
    let opened = hall.ask(Audience::take).await?;
    tokio::time::sleep(SETTLES).await;
    let full = Glance::now(stage)?;
    if Instant::now() > opening {
        bail!("the sale opened before everybody had subscribed: give it more time with --opens-in");
    }

    let watch = async {
        sleep_until((opening + WARM_UP).into()).await;
        hall.ask(Audience::measure).await?;
        let begin = Glance::now(stage)?;
        sleep_until((opening + storm_at).into()).await;
        let steady = hall.ask(Audience::take).await?;
        let end = Glance::now(stage)?;
        let begun = Instant::now();
        let cut = move |audience: &mut Audience| {
            audience.cut(storm);
            audience.follow(PATIENCE, everybody)
        };
        let all_back = hall.ask(cut).await?;
        let back_after = begun.elapsed();
        Ok(Watched {
            storm: hall.ask(Audience::take).await?,
            opened,
            steady,
            all_came,
            opened_after,
            all_back,
            back_after,
            before,
            full,
            begin,
            end,
        })
    };
    let (mut crowded, watched) = tokio::try_join!(run.send(roots), watch)?;
    let answered = answered(&crowded.records, opening_us)?;
    let last = answered.last_key_value().map_or(0, |(seq, _)| *seq);
    let see_the_last = move |audience: &mut Audience| {
        audience.set_goal(last);
        let all = audience.follow(PATIENCE, Audience::all_at_goal)?;
        Ok((all, audience.at_goal()))
    };
    let (_, at_last) = hall.ask(see_the_last).await?;
    run.settle(&mut crowded).await;
    let settled = bench.stage.as_ref().map(Stage::roots);
    let settled = settled.map(|roots| roots.look()).transpose()?;
    let mut phase = trial::phase("sse", &run, &crowded)?;
    if let Some(settled) = settled {
        trial::processes(&mut phase, &crowded, &settled);
    }
    let judged = run.judge(&crowded).await?;

    let mut checks = checks(&watched, seats, at_last);
    bench.findings.checks.append(&mut checks);
    let unseen = unseen(&watched.steady, &answered);
    if let Some(speed) = &mut phase.speed {
        let other = &mut speed.other_ms;
        let mut note = |name: &str, of: Percentiles| other.insert(name.to_owned(), of);
        note(
            "subscribe to snapshot",
            percentiles(&watched.opened.joined_us)?,
        );
        note(
            "age of the value when it is read",
            percentiles(&watched.steady.age_read_us)?,
        );
        note("acceptance not shown", Percentiles::of(unseen.into_iter())?);
        note(
            "reconnect to snapshot",
            percentiles(&watched.storm.joined_us)?,
        );
        let quiet = latencies(&crowded.records, WARM_UP, storm_at);
        note("purchase before the storm", Percentiles::of(quiet)?);
        let stormy = latencies(&crowded.records, storm_at, storm_at + STORM);
        note("purchase during the storm", Percentiles::of(stormy)?);
    }
    figures(bench, &watched, seats);
    if let Some(speed) = &phase.speed {
        for (figure, of) in [
            ("age_read_p99_ms", "age of the value when it is read"),
            ("unseen_p99_ms", "acceptance not shown"),
            ("purchase_p99_ms", "purchase before the storm"),
            ("purchase_in_storm_p99_ms", "purchase during the storm"),
        ] {
            bench.figure(Figure::new(figure, speed.other_ms[of].p99, "ms"));
        }
    }
    let slow = [&watched.opened, &watched.steady, &watched.storm]
        .iter()
        .any(|seen| is_bottleneck(seen));
    phase.generator.bottleneck |= slow;
    bench.conclude(phase, &judged)
}

/// Whether the harness was what was slow.
fn is_bottleneck(seen: &Seen) -> bool {
    let away = Duration::from_micros(seen.batches_us.value_at_quantile(0.99));
    seen.effort.share() > BUSY_SHARE || away > LOOKED_AWAY
}

fn figures(bench: &mut Bench, watched: &Watched, seats: usize) {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let number = |count: u64| count as f64;
    let each = |bytes: u64| number(bytes) / number(seats.max(1) as u64);
    let Watched {
        steady,
        before,
        full,
        begin,
        end,
        ..
    } = watched;
    let subscribers = Figure::new("subscribers", number(seats as u64), "");
    bench.figure(subscribers.with_goal(Goal::at_least(SUBSCRIBERS_GOAL)));
    if let (Some(before), Some(full), Some(end)) = (before.memory(), full.memory(), end.memory()) {
        let bytes = each(full.max(end).saturating_sub(before));
        let memory = Figure::new("bytes_per_subscriber", bytes, "bytes");
        bench.figure(memory.with_goal(Goal::at_most(BYTES_GOAL)));
    }
    if let Some(age) = steady.age_shown.quantile(0.99) {
        let age = Figure::new("age_p99_ms", age, "ms");
        bench.figure(age.with_goal(Goal::at_most(AGE_MS_GOAL)));
    }
    for (name, quantile) in [("age_p50_ms", 0.5), ("age_p99_9_ms", 0.999)] {
        if let Some(age) = steady.age_shown.quantile(quantile) {
            bench.figure(Figure::new(name, age, "ms"));
        }
    }
    let kernel = end.kernel_bytes.saturating_sub(before.kernel_bytes);
    bench.figure(Figure::new(
        "kernel_both_ends_each_bytes",
        each(kernel),
        "bytes",
    ));
    let wall = end.at.duration_since(begin.at).as_secs_f64();
    bench.figure(Figure::new(
        "frames_per_s",
        number(steady.frames) / wall,
        "/s",
    ));
    if let (Some(begin), Some(end)) = (begin.cpu(), end.cpu()) {
        let cpu = end.saturating_sub(begin).as_secs_f64();
        bench.figure(Figure::new("application_cores", cpu / wall, ""));
        let us = cpu * 1e6 / number(steady.frames.max(1));
        bench.figure(Figure::new("application_us_per_frame", us, "µs"));
    }
    bench.figure(Figure::new(
        "all_subscribed_ms",
        ms(watched.opened_after),
        "ms",
    ));
    bench.figure(Figure::new("all_back_ms", ms(watched.back_after), "ms"));
    let errors = number(watched.storm.errors_total());
    bench.figure(Figure::new("storm_errors", errors, ""));
    let share = watched.steady.effort.share();
    bench.figure(Figure::new("audience_cpu_share", share, ""));
}

/// What was promised to subscribers.
fn checks(watched: &Watched, seats: usize, at_last: usize) -> Vec<Check> {
    let Watched {
        opened,
        steady,
        storm,
        ..
    } = watched;
    let reasons = |seen: &Seen| -> Vec<String> {
        let reasons = seen.errors.iter();
        reasons
            .map(|(why, count)| format!("{count} × {why}"))
            .collect()
    };
    let unless = |sound: bool, proof: String| if sound { Vec::new() } else { vec![proof] };
    let disorder = opened.disorder + steady.disorder + storm.disorder;
    let first = [opened, steady, storm].map(|seen| seen.first_disorder.clone());
    let first: Vec<_> = first.into_iter().flatten().take(1).collect();
    let cut_off: Vec<String> = [reasons(opened), reasons(steady)].concat();
    let back = unless(watched.all_back, format!("not after {PATIENCE:?}"));
    vec![
        Check::of(
            "everybody is shown the sale",
            format!("{seats} snapshots"),
            if watched.all_came {
                "all came"
            } else {
                "not all came"
            },
            unless(watched.all_came, format!("not after {PATIENCE:?}")),
        ),
        Check::of(
            "nobody is cut off",
            0,
            opened.errors_total() + steady.errors_total(),
            cut_off,
        ),
        Check::of(
            "ids of a subscriber only grow",
            "no other",
            format!("{disorder} others"),
            first,
        ),
        Check::of(
            "everybody comes back",
            "all",
            if watched.all_back { "all" } else { "some" },
            back,
        ),
        Check::of(
            "the last value reaches everybody",
            seats,
            at_last,
            unless(
                at_last == seats,
                format!("{} do not have it", seats - at_last),
            ),
        ),
    ]
}

/// When each seq was answered, microseconds since the Unix epoch.
fn answered(records: &[Record], opening_us: i64) -> Result<BTreeMap<u64, i64>> {
    #[derive(Deserialize)]
    struct Placed {
        seq: u64,
    }
    let mut answered = BTreeMap::new();
    for record in records {
        if let Outcome::Accepted { body, .. } = &record.outcome {
            let Placed { seq } = serde_json::from_slice(body)?;
            let at = opening_us + i64::try_from(record.finished.as_micros())?;
            answered.insert(seq, at);
        }
    }
    Ok(answered)
}

/// At each frame: how long the first acceptance that it was the first to show had been answered.
fn unseen(seen: &Seen, answered: &BTreeMap<u64, i64>) -> Vec<Duration> {
    let waits = seen.steps.iter().filter_map(|step| {
        let at = answered.get(&(step.from_seq + 1))?;
        Some(Duration::from_micros(
            u64::try_from(step.at - at).unwrap_or(0),
        ))
    });
    waits.collect()
}

/// Latency of the purchases that were planned for this time.
fn latencies(
    records: &[Record],
    from: Duration,
    to: Duration,
) -> impl Iterator<Item = Duration> + '_ {
    let planned = move |record: &&Record| (from..to).contains(&record.due);
    let records = records.iter().filter(planned);
    records.map(|record| record.finished.saturating_sub(record.due))
}

fn percentiles(us: &Histogram<u64>) -> Result<Percentiles> {
    let values = us.iter_recorded().flat_map(|value| {
        let count = usize::try_from(value.count_since_last_iteration()).unwrap_or(usize::MAX);
        repeat_n(Duration::from_micros(value.value_iterated_to()), count)
    });
    Percentiles::of(values)
}

/// What the kernel keeps of its own (sockets and files among it) and in the buffers of TCP.
fn kernel_bytes() -> u64 {
    let file = |path| fs::read_to_string(path).unwrap_or_default();
    let slab = memory_bytes(&file("/proc/meminfo"), "Slab:");
    let buffers = || -> Option<u64> {
        let sockets = file("/proc/net/sockstat");
        let line = sockets.lines().find_map(|line| line.strip_prefix("TCP:"))?;
        let (_, pages) = line.split_once(" mem ")?;
        Some(pages.trim().parse::<u64>().ok()? * rustix::param::page_size() as u64)
    };
    slab.unwrap_or(0) + buffers().unwrap_or(0)
}
