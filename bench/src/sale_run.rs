//! One crowd at one sale, or at several at once, from the first token to the verdict: what every
//! scenario is made of.
//!
//! [`SaleRun::prepare`] makes the sales and opens the connections, [`SaleRun::send`] sends the
//! crowd, [`SaleRun::judge`] gathers the history from every side and looks at every promise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bytes::Bytes;
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{sleep, sleep_until};
use uuid::Uuid;

use crate::clock;
use crate::host;
use crate::load::crowd::{Arrival, Crowd};
use crate::load::outcome::{Outcome, judge};
use crate::load::sender::{Load, Pool, Record, Requests, Sending, Sent, Tally};
use crate::load::tokens::{Role, Signer};
use crate::operator::{self, Operator, Terms};
use crate::sse::{Frame, Subscriber};
use crate::target::{Backstage, Target};
use crate::verdict::{self, Check, Ending, History, Order, Purchase, Replay, Status};
use crate::witness;

/// Connections unless asked for otherwise: several thousand requests in flight.
const CONNECTIONS: usize = 4096;

/// Connections that send accepted purchases again.
const REPLAY_CONNECTIONS: usize = 64;

/// How long the live stock may take to show its first and its last value.
const FRAME_MAX: Duration = Duration::from_secs(5);

/// Pause between two looks at the crowd.
const REDRAW: Duration = Duration::from_millis(50);

/// Codes of refusals that the shop may give for want of stock or room under the limit.
const FAIR_REFUSALS: [&str; 4] = ["sold_out", "insufficient", "buyer_limit", "order_limit"];

/// The server that a run is made at.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) target: Target,
    pub(crate) backstage: Backstage,
}

/// What a run is to be like.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// What the sales are called.
    pub(crate) name: String,
    pub(crate) crowd: Crowd,
    /// Units of each sale.
    pub(crate) stock: u64,
    /// Units that one buyer may have.
    pub(crate) limit: u64,
    /// Kept-alive connections, if not as many as are usual.
    pub(crate) connections: Option<usize>,
    /// Threads that drive them.
    pub(crate) threads: usize,
    /// Time for one answer.
    pub(crate) timeout: Duration,
    /// How long a buyer tries again, and an operator waits for a verdict.
    pub(crate) patience: Duration,
    /// Of every so many requests one loses its connection as soon as it was sent.
    pub(crate) cuts_every: Option<usize>,
    /// From making the sales to their opening.
    pub(crate) opens_in: Duration,
    /// Watch the live stock of the first sale.
    pub(crate) attach_sse: bool,
    /// Accepted purchases to send again after the crowd and after the end.
    pub(crate) replays: usize,
}

impl Wish {
    /// What most runs have in common.
    pub(crate) fn new(name: &str, crowd: Crowd, stock: u64) -> Self {
        Self {
            name: name.to_owned(),
            crowd,
            stock,
            limit: 1,
            connections: None,
            threads: 1,
            timeout: Duration::from_secs(10),
            patience: Duration::from_mins(1),
            cuts_every: None,
            opens_in: Duration::from_millis(500),
            attach_sse: false,
            replays: 20,
        }
    }
}

/// A crowd that stands before its sales.
pub(crate) struct SaleRun {
    pub(crate) wish: Wish,
    pub(crate) server: Server,
    pub(crate) operator: Operator,
    pub(crate) sales: Vec<Uuid>,
    pub(crate) opens_at: DateTime<Utc>,
    pub(crate) opening: Instant,
    /// Connections that stand, and those that were wanted.
    pub(crate) connections: usize,
    pub(crate) connections_wanted: usize,
    pub(crate) tally: Arc<Tally>,
    buyers: Vec<Uuid>,
    load: Load,
    sending: Arc<Sending>,
    pool: Option<Pool>,
    subscriber: Option<Subscriber>,
    progress: ProgressBar,
}

/// What the crowd went through.
pub(crate) struct Crowded {
    /// One for each request of the plan.
    pub(crate) records: Vec<Record>,
    /// Tries that the harness sent late although a connection was free.
    pub(crate) late: usize,
    /// Processor time of the harness, and for how long.
    pub(crate) cpu: Duration,
    pub(crate) wall: Duration,
    /// From the opening until every acceptance was seen to be stored.
    pub(crate) stored_after: Option<Duration>,
}

/// What came of it.
pub(crate) struct Judged {
    pub(crate) checks: Vec<Check>,
    /// Of each sale.
    pub(crate) histories: Vec<History>,
}

impl Judged {
    /// Whether every promise was kept.
    #[allow(dead_code, reason = "a drop asks its document")]
    pub(crate) fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.status != Status::Fail)
    }

    /// From the opening to the acceptance of the last unit, if there is none left of the first
    /// sale.
    pub(crate) fn sold_out_after(&self) -> Option<Duration> {
        sold_out_after(self.histories.first()?)
    }
}

impl SaleRun {
    /// Makes the sales, signs the tokens and opens the connections.
    ///
    /// # Errors
    ///
    /// No server, no secret, no right to make a sale, or no connection.
    pub(crate) async fn prepare(server: &Server, wish: Wish) -> Result<Self> {
        operator::reach(&server.target).await?;
        let Wish { crowd, .. } = &wish;
        let plan = crowd.plan();
        let progress = progress(plan.len())?;
        let connections_wanted = wish.connections.unwrap_or(CONNECTIONS.min(plan.len()));
        let load = Load {
            target: server.target.clone(),
            connections: connections_wanted.min(host::connections_max()),
            threads: wish.threads,
            timeout: wish.timeout,
            patience: wish.patience,
            cuts_every: wish.cuts_every,
            seed: crowd.seed,
        };
        let signer = Signer::new(&server.backstage.secret()?, clock::now());
        let run = Uuid::from_u128(rand::random());
        let operator = Operator {
            target: server.target.clone(),
            bearer: signer.bearer(run, Role::Operator)?,
            patience: wish.patience,
        };
        progress.set_message("signing tokens");
        let buyers = crowd.ids();
        let bearers = signer.buyers(&buyers)?;
        progress.set_message("opening connections");
        let pool = Pool::open(&load).await?;
        let product = operator
            .create_product(&wish.name, &format!("product-{run}"))
            .await?;
        let opens_at = (clock::now() + TimeDelta::from_std(wish.opens_in)?)
            .duration_trunc(TimeDelta::milliseconds(1))?;
        let terms = Terms {
            name: wish.name.clone(),
            allocation: wish.stock,
            per_buyer_limit: wish.limit,
            opens_at,
        };
        let mut sales = Vec::with_capacity(crowd.sales);
        for n in 0..crowd.sales {
            let key = format!("sale-{product}-{n}");
            sales.push(operator.create_sale(product, &terms, &key).await?.id);
        }
        let subscriber = match sales.first() {
            Some(sale) if wish.attach_sse => {
                let path = format!("/v1/sales/{sale}/events").parse()?;
                let mut subscriber = Subscriber::attach(server.target.clone(), path);
                subscriber.wait_for(FRAME_MAX, |_| true).await;
                Some(subscriber)
            }
            _ => None,
        };
        let Ok(left) = (opens_at - clock::now()).to_std() else {
            bail!("the sale opened before the crowd was ready: give it more time with --opens-in");
        };
        let opening = Instant::now() + left;
        let paths = sales.iter().map(|sale| format!("/v1/sales/{sale}/orders"));
        let body = format!(r#"{{"quantity":{}}}"#, crowd.quantity);
        let requests = Requests::new(&server.target, paths, bearers, run.to_string(), &body);
        Ok(Self {
            operator,
            opens_at,
            opening,
            connections: pool.opened,
            connections_wanted,
            tally: Arc::default(),
            buyers,
            load,
            sending: Arc::new(Sending {
                requests: Arc::new(requests),
                plan,
                judge,
                opening,
            }),
            pool: Some(pool),
            subscriber,
            progress,
            sales,
            server: server.clone(),
            wish,
        })
    }

    /// Sends the crowd, and waits until what it bought is stored.
    ///
    /// # Errors
    ///
    /// The crowd was already sent, or could not be followed.
    pub(crate) async fn send(&mut self) -> Result<Crowded> {
        let Some(pool) = self.pool.take() else {
            bail!("the crowd was already sent");
        };
        self.progress.set_message("waiting for the opening");
        let watch = watch(self.progress.clone(), Arc::clone(&self.tally), self.opening);
        let watch = tokio::spawn(watch);
        let opening = self.opening;
        let opened_at = async {
            sleep_until(opening.into()).await;
            Ok(host::cpu_time())
        };
        let sent = async {
            let (sending, tally) = (Arc::clone(&self.sending), Arc::clone(&self.tally));
            let sent = pool.run(sending, tally).await?;
            Ok((sent, host::cpu_time(), opening.elapsed()))
        };
        let (cpu_before, (sent, cpu_after, wall), stored_after) =
            tokio::try_join!(opened_at, sent, self.stored())?;
        watch.abort();
        let Sent { records, late } = sent;
        Ok(Crowded {
            records,
            late,
            cpu: cpu_after.saturating_sub(cpu_before),
            wall,
            stored_after,
        })
    }

    /// Waits until no more can be bought and everything that was is stored.
    async fn stored(&self) -> Result<Option<Duration>> {
        // Once the last order is in, the rest of the crowd only gets refused.
        let Wish {
            crowd,
            stock,
            limit,
            ..
        } = &self.wish;
        let orders: u64 = (0..crowd.sales)
            .map(|sale| crowd.orders_expected(sale, *stock, *limit, 0).1)
            .sum();
        let orders = usize::try_from(orders)?;
        let requests = self.sending.plan.len();
        while self.tally.accepted.load(Ordering::Relaxed) < orders && self.tally.ended() < requests
        {
            sleep(REDRAW).await;
        }
        for sale in &self.sales {
            match self.operator.audit(*sale).await {
                Ok(audit) if audit.verdict != "pending" => {}
                _ => return Ok(None),
            }
        }
        Ok(Some(self.opening.elapsed()))
    }

    /// Sends some accepted purchases again, ends the sales, and judges the whole history.
    ///
    /// # Errors
    ///
    /// The retries could not be made.
    pub(crate) async fn judge(mut self, crowded: &Crowded) -> Result<Judged> {
        let after = self.after().await;
        self.progress
            .set_message("sending accepted purchases again");
        let mut replays = copies(&self.sending.plan, &crowded.records);
        let sample = sample(&crowded.records, self.wish.replays);
        replays.extend(self.replay(&sample, "after the crowd").await?);
        let mut closed = Vec::with_capacity(self.sales.len());
        for sale in &self.sales {
            closed.push(self.operator.close(*sale).await);
        }
        replays.extend(self.replay(&sample, "after the end").await?);
        self.progress.set_message("counting");
        let mut purchases = self.purchases(&crowded.records);
        let mut histories = Vec::with_capacity(self.sales.len());
        let mut frames = self.subscriber.take().map(|subscriber| subscriber.frames());
        for (n, (after, closed)) in after.into_iter().zip(closed).enumerate() {
            let sale = self.sales[n];
            let purchases = purchases.remove(&n).unwrap_or_default();
            let numbers: BTreeMap<usize, usize> = (purchases.iter().enumerate())
                .map(|(position, (request, _))| (*request, position))
                .collect();
            let lost = purchases.iter().filter(|(_, one)| is_lost(&one.ending));
            let lost = u64::try_from(lost.count())?;
            let Wish { crowd, .. } = &self.wish;
            histories.push(History {
                sale,
                opens_at: self.opens_at,
                allocation: self.wish.stock,
                per_buyer_limit: self.wish.limit,
                quantity: crowd.quantity,
                orders_expected: crowd.orders_expected(n, self.wish.stock, self.wish.limit, lost),
                purchases: purchases
                    .into_iter()
                    .map(|(_, purchase)| purchase)
                    .collect(),
                rows: witness::orders(&self.server.backstage, sale)
                    .await
                    .map_err(line),
                leaderboard: self.operator.leaderboard(sale).await.map_err(line),
                after: after.map_err(line),
                closed: closed.map(|sale| sale.state).map_err(line),
                audit: self.operator.audit(sale).await.map_err(line),
                frames: frames.take(),
                replays: replays
                    .iter()
                    .filter_map(|replay| {
                        let purchase = *numbers.get(&replay.purchase)?;
                        let replay = replay.clone();
                        Some(Replay { purchase, ..replay })
                    })
                    .collect(),
            });
        }
        self.progress.finish_and_clear();
        let checks = histories.iter().map(verdict::check).collect();
        Ok(Judged {
            checks: verdict::of_all(checks),
            histories,
        })
    }

    /// The sales after the crowd, once the subscriber saw the last of them, too.
    async fn after(&mut self) -> Vec<Result<operator::Sale>> {
        self.progress.set_message("waiting for the last frame");
        let mut after = Vec::with_capacity(self.sales.len());
        for sale in &self.sales {
            after.push(self.operator.sale(*sale).await);
        }
        if let (Some(subscriber), Some(Ok(after))) = (&mut self.subscriber, after.first()) {
            let last = |frame: &Frame| {
                let stock = frame.stock.as_ref();
                stock.is_ok_and(|stock| stock.remaining == after.remaining)
            };
            // What the last frame really shows is judged later.
            subscriber.wait_for(FRAME_MAX, last).await;
        }
        after
    }

    /// Sends accepted purchases once more, with their old keys.
    pub(crate) async fn replay(
        &self,
        sample: &[(usize, Bytes)],
        when: &'static str,
    ) -> Result<Vec<Replay>> {
        if sample.is_empty() {
            return Ok(Vec::new());
        }
        let plan = sample.iter().map(|(purchase, _)| Arrival {
            due: Duration::ZERO,
            ..self.sending.plan[*purchase]
        });
        let load = Load {
            connections: REPLAY_CONNECTIONS.min(sample.len()),
            cuts_every: None,
            ..self.load.clone()
        };
        let sending = Sending {
            requests: Arc::clone(&self.sending.requests),
            plan: plan.collect(),
            judge,
            opening: Instant::now(),
        };
        let pool = Pool::open(&load).await?;
        let sent = pool.run(Arc::new(sending), Arc::default()).await?;
        let replays = sent.records.into_iter().zip(sample);
        Ok(replays
            .map(|(record, (purchase, first))| Replay {
                purchase: *purchase,
                when,
                first: first.clone(),
                again: match record.outcome {
                    Outcome::Accepted {
                        replayed: true,
                        body,
                    } => Ok(body),
                    Outcome::Accepted { .. } => Err("a 201 as if it were new".to_owned()),
                    Outcome::Refused { code: reason }
                    | Outcome::Failed { reason }
                    | Outcome::Unknown { reason } => Err(reason),
                },
            })
            .collect())
    }

    /// What each purchase went through, by sale, with its first request: copies are one purchase.
    fn purchases(&self, records: &[Record]) -> BTreeMap<usize, Vec<(usize, Purchase)>> {
        let mut by_sale: BTreeMap<usize, Vec<(usize, Purchase)>> = BTreeMap::new();
        let copies = self.wish.crowd.copies;
        for copies in records.chunks(copies) {
            let Some(first) = copies.first() else {
                continue;
            };
            let arrival = &self.sending.plan[first.purchase];
            let purchase = purchase(copies, self.buyers[arrival.buyer]);
            let purchases = by_sale.entry(arrival.sale).or_default();
            purchases.push((first.purchase, purchase));
        }
        by_sale
    }
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
    sleep_until(opening.into()).await;
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
fn is_lost(ending: &Ending) -> bool {
    match ending {
        Ending::Accepted(_) => false,
        Ending::Refused(code) => !FAIR_REFUSALS.contains(&code.as_str()),
        Ending::Failed(_) | Ending::Unknown(_) => true,
    }
}

/// The history of one purchase, as its buyer saw it: the first acceptance if there is one, else
/// the first word on it, unless another copy may have bought.
fn purchase(copies: &[Record], buyer: Uuid) -> Purchase {
    let rank = |record: &&Record| {
        let kind = match &record.outcome {
            Outcome::Accepted { .. } => 0,
            Outcome::Unknown { .. } => 1,
            Outcome::Refused { .. } => 2,
            Outcome::Failed { .. } => 3,
        };
        (kind, record.finished)
    };
    let decisive = copies.iter().min_by_key(rank);
    Purchase {
        buyer,
        first_sent: copies.iter().filter_map(|record| record.first_sent).min(),
        finished: decisive.map_or(Duration::ZERO, |record| record.finished),
        ending: match decisive.map(|record| &record.outcome) {
            Some(Outcome::Accepted { body, .. }) => Ending::Accepted(
                serde_json::from_slice::<Order>(body).map_err(|error| error.to_string()),
            ),
            Some(Outcome::Refused { code }) => Ending::Refused(code.clone()),
            Some(Outcome::Failed { reason }) => Ending::Failed(reason.clone()),
            Some(Outcome::Unknown { reason }) => Ending::Unknown(reason.clone()),
            None => Ending::Failed("never planned".to_owned()),
        },
    }
}

/// What copies of one purchase were answered, next to the first acceptance of any of them: the
/// same 201, or for want of an answer nothing.
fn copies(plan: &[Arrival], records: &[Record]) -> Vec<Replay> {
    let mut replays = Vec::new();
    let same_key =
        |one: &Record, other: &Record| plan[one.purchase].key == plan[other.purchase].key;
    for copies in records.chunk_by(same_key).filter(|copies| copies.len() > 1) {
        let accepted = copies.iter().filter_map(|record| match &record.outcome {
            Outcome::Accepted { body, .. } => Some((record.finished, body)),
            _ => None,
        });
        let Some((_, first)) = accepted.min_by_key(|(finished, _)| *finished) else {
            continue;
        };
        replays.extend(copies.iter().filter_map(|record| {
            let again = match &record.outcome {
                Outcome::Accepted { body, .. } => Ok(body.clone()),
                Outcome::Refused { code } => Err(code.clone()),
                // Without an answer nothing is known.
                Outcome::Failed { .. } | Outcome::Unknown { .. } => return None,
            };
            Some(Replay {
                purchase: copies[0].purchase,
                when: "at the same time",
                first: first.clone(),
                again,
            })
        }));
    }
    replays
}

/// Accepted purchases with their bodies, at most so many, spread over all of them. Of copies only
/// the first counts.
pub(crate) fn sample(records: &[Record], most: usize) -> Vec<(usize, Bytes)> {
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

/// An error with its causes in one line.
#[expect(clippy::needless_pass_by_value, reason = "it is passed to `map_err`")]
fn line(error: anyhow::Error) -> String {
    format!("{error:#}")
}
