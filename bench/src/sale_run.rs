//! One crowd at one sale, or at several at once, from the first token to the verdict: what every
//! scenario is made of.
//!
//! [`SaleRun::prepare`] makes the sales and opens the connections, [`SaleRun::send`] sends the
//! crowd, [`SaleRun::judge`] gathers the history from every side and looks at every promise.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bytes::Bytes;
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use indicatif::ProgressBar;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};
use uuid::Uuid;

use crate::clock;
use crate::host;
use crate::load::crowd::{Arrival, Crowd};
use crate::load::outcome::{Outcome, judge};
use crate::load::sender::{Load, Pool, Record, Requests, Sending, Sent, Tally};
use crate::load::tokens::{Role, Signer};
use crate::operator::{self, Operator, Terms};
use crate::report::live::{self, Scene};
use crate::sse::{Frame, Subscriber};
use crate::target::{Backstage, Target};
use crate::usage::{Look, Roots};
use crate::verdict::{self, Check, Ending, History, Order, Purchase, Replay, Status};
use crate::witness::{self, Watch};

/// Connections unless asked for otherwise: several thousand requests in flight.
const CONNECTIONS: usize = 4096;

/// Connections that send accepted purchases again.
const REPLAY_CONNECTIONS: usize = 64;

/// How long the live stock may take to show its first and its last value.
const FRAME_MAX: Duration = Duration::from_secs(5);

/// Between two looks at the server's processes.
const SAMPLE: Duration = Duration::from_millis(500);

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
    /// Between two looks at how much is stored.
    pub(crate) looks_every: Duration,
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
            looks_every: Duration::from_millis(20),
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
    /// Purchases that were accepted: copies of one have one order.
    pub(crate) orders: usize,
    /// Tries that the harness sent late although a connection was free.
    pub(crate) late: usize,
    /// Processor time of the harness, and for how long.
    pub(crate) cpu: Duration,
    pub(crate) wall: Duration,
    /// How many orders were seen to be stored, and when.
    pub(crate) stored: Vec<(Duration, u64)>,
    /// What the server's processes had used, and when: at the opening, every now and then, and when
    /// the last answer was in.
    pub(crate) looks: Vec<(Duration, Look)>,
}

impl Crowded {
    /// Requests that were accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.acceptances().count()
    }

    /// When each acceptance was answered.
    pub(crate) fn acceptances(&self) -> impl Iterator<Item = Duration> {
        let accepted = |record: &&Record| matches!(record.outcome, Outcome::Accepted { .. });
        let records = self.records.iter().filter(accepted);
        records.map(|record| record.finished)
    }

    /// Refusals with a code, per second between the first and the last of them.
    pub(crate) fn refusals_per_s(&self, wanted: &str) -> f64 {
        let refused = |record: &&Record| matches!(&record.outcome, Outcome::Refused { code } if code == wanted);
        let refused = self.records.iter().filter(refused);
        let instants: Vec<Duration> = refused.map(|record| record.finished).collect();
        let (Some(first), Some(last)) = (instants.iter().min(), instants.iter().max()) else {
            return 0.0;
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let count = instants.len() as f64;
        count / last.saturating_sub(*first).as_secs_f64().max(1e-6)
    }

    /// From the opening until as many orders as were accepted were seen to be stored.
    pub(crate) fn stored_after(&self) -> Option<Duration> {
        let orders = self.orders as u64;
        let all = self.stored.iter().find(|(_, stored)| *stored >= orders);
        all.map(|(instant, _)| *instant)
    }

    /// From each 201 to the look that found its row. Of one sale whose orders are all there is.
    pub(crate) fn lags(&self, history: &History) -> Vec<Duration> {
        let orders = history.purchases.iter();
        let orders = orders.filter_map(|purchase| match &purchase.ending {
            Ending::Accepted(Ok(order)) => Some((order.seq, purchase.finished)),
            _ => None,
        });
        self.lags_of(orders.collect())
    }

    fn lags_of(&self, mut answered: Vec<(u64, Duration)>) -> Vec<Duration> {
        answered.sort_unstable();
        let mut looks = self.stored.iter().peekable();
        let lag = |(seq, answered): (u64, Duration)| {
            while looks.next_if(|(_, stored)| *stored < seq).is_some() {}
            let (seen, _) = looks.peek()?;
            Some(seen.saturating_sub(answered))
        };
        answered.into_iter().filter_map(lag).collect()
    }
}

/// What came of it.
pub(crate) struct Judged {
    /// Of each sale.
    pub(crate) checks: Vec<Vec<Check>>,
    pub(crate) histories: Vec<History>,
}

impl Judged {
    /// Whether every promise was kept.
    pub(crate) fn passed(&self) -> bool {
        let mut checks = self.checks.iter().flatten();
        checks.all(|check| check.status != Status::Fail)
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
        let progress = live::bar(plan.len())?;
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
            hold: None,
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

    /// Sends the crowd; looks at the server's processes meanwhile, if it is known which they are.
    ///
    /// # Errors
    ///
    /// The crowd was already sent, or could not be followed.
    pub(crate) async fn send(&mut self, roots: Option<Roots>) -> Result<Crowded> {
        let Some(pool) = self.pool.take() else {
            bail!("the crowd was already sent");
        };
        self.progress.set_message("waiting for the opening");
        let scene = Scene {
            units: self.wish.stock.saturating_mul(self.sales.len() as u64),
            quantity: self.wish.crowd.quantity,
            threads: self.wish.threads,
        };
        let (bar, tally) = (self.progress.clone(), Arc::clone(&self.tally));
        let watch = tokio::spawn(live::watch(bar, tally, scene, self.opening));
        let opening = self.opening;
        let opened_at = async {
            sleep_until(opening.into()).await;
            host::cpu_time()
        };
        let (over, is_over) = watch::channel(false);
        let sent = async {
            let (sending, tally) = (Arc::clone(&self.sending), Arc::clone(&self.tally));
            let sent = pool.run(sending, tally).await;
            over.send_replace(true);
            (sent, host::cpu_time(), opening.elapsed())
        };
        let stored = self.stored(is_over.clone());
        let looks = looks(roots, opening, is_over);
        let (cpu_before, (sent, cpu_after, wall), stored, looks) =
            tokio::join!(opened_at, sent, stored, looks);
        watch.abort();
        let Sent { records, late } = sent?;
        let accepted = records
            .iter()
            .filter(|record| matches!(record.outcome, Outcome::Accepted { .. }));
        let keys: HashSet<usize> = accepted
            .map(|record| self.sending.plan[record.purchase].key)
            .collect();
        Ok(Crowded {
            records,
            orders: keys.len(),
            late,
            cpu: cpu_after.saturating_sub(cpu_before),
            wall,
            stored,
            looks: looks?,
        })
    }

    /// Looks at how many orders are stored, until the crowd is over.
    async fn stored(&self, mut is_over: watch::Receiver<bool>) -> Vec<(Duration, u64)> {
        let mut seen = Vec::new();
        let Some(mut watch) = Watch::of(&self.server.backstage, &self.sales).await else {
            return seen;
        };
        sleep_until(self.opening.into()).await;
        loop {
            let is_last = *is_over.borrow();
            self.look_at_stored(&mut watch, &mut seen).await;
            if is_last {
                return seen;
            }
            // The end of the crowd ends the pause, too.
            let _ = timeout(self.wish.looks_every, is_over.changed()).await;
        }
    }

    async fn look_at_stored(&self, watch: &mut Watch, seen: &mut Vec<(Duration, u64)>) {
        if let Ok(Some(units)) = watch.sold().await {
            let orders = units / self.wish.crowd.quantity;
            if seen.last().is_none_or(|(_, before)| *before < orders) {
                seen.push((self.opening.elapsed(), orders));
            }
        }
    }

    /// Waits until everything that was accepted is stored, at most as long as the operator does.
    pub(crate) async fn settle(&self, crowded: &mut Crowded) {
        let Some(mut watch) = Watch::of(&self.server.backstage, &self.sales).await else {
            return;
        };
        let begun = Instant::now();
        while begun.elapsed() < self.wish.patience {
            self.look_at_stored(&mut watch, &mut crowded.stored).await;
            if crowded.stored_after().is_some() {
                return;
            }
            sleep(self.wish.looks_every).await;
        }
        self.progress.set_message("not all orders are stored");
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
        Ok(Judged {
            checks: histories.iter().map(verdict::check).collect(),
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

/// Looks at processes every now and then until the crowd is over.
async fn looks(
    roots: Option<Roots>,
    opening: Instant,
    mut is_over: watch::Receiver<bool>,
) -> Result<Vec<(Duration, Look)>> {
    let mut looks = Vec::new();
    let Some(roots) = roots else {
        return Ok(looks);
    };
    sleep_until(opening.into()).await;
    loop {
        let is_last = *is_over.borrow();
        looks.push((opening.elapsed(), roots.look()?));
        if is_last {
            return Ok(looks);
        }
        // The end of the crowd ends the pause, too.
        let _ = timeout(SAMPLE, is_over.changed()).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(key: usize) -> Arrival {
        Arrival {
            buyer: key,
            key,
            sale: 0,
            due: Duration::ZERO,
        }
    }

    fn record(purchase: usize, ms: u64, outcome: Outcome) -> Record {
        Record {
            purchase,
            due: Duration::ZERO,
            first_sent: Some(Duration::ZERO),
            last_sent: Duration::ZERO,
            finished: Duration::from_millis(ms),
            retries: 0,
            outcome,
        }
    }

    fn accepted(body: &'static str) -> Outcome {
        Outcome::Accepted {
            replayed: false,
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    fn refused() -> Outcome {
        Outcome::Refused {
            code: "sold_out".to_owned(),
        }
    }

    #[test]
    fn every_copy_must_get_the_first_201_and_nothing_else() {
        let plan: Vec<Arrival> = [0, 0, 0, 1, 1, 2].map(arrival).into();
        let lost = Outcome::Unknown {
            reason: "connection lost".to_owned(),
        };
        let records = [
            record(0, 9, accepted("b")),
            record(1, 5, accepted("a")),
            record(2, 1, refused()),
            record(3, 1, lost),
            record(4, 2, accepted("c")),
            record(5, 1, accepted("d")),
        ];
        let copies = copies(&plan, &records);
        let again: Vec<_> = copies.iter().map(|copy| copy.again.clone()).collect();
        let bytes = |text: &'static str| Ok(Bytes::from_static(text.as_bytes()));
        let wanted = [
            bytes("b"),
            bytes("a"),
            Err("sold_out".to_owned()),
            bytes("c"),
        ];
        assert_eq!(again, wanted);
        let firsts: Vec<_> = copies.iter().map(|copy| &copy.first[..]).collect();
        assert_eq!(firsts, [&b"a"[..], b"a", b"a", b"c"]);
    }

    #[test]
    fn a_purchase_with_copies_is_accepted_if_any_of_them_is() {
        let copies = [record(0, 1, refused()), record(1, 7, accepted("{}"))];
        let purchase = purchase(&copies, Uuid::nil());
        assert!(matches!(purchase.ending, Ending::Accepted(_)));
        assert_eq!(purchase.finished, Duration::from_millis(7));
    }

    #[test]
    fn rates_and_the_way_to_the_row_follow_from_what_was_seen() {
        let second = Duration::from_secs;
        let crowded = Crowded {
            records: vec![
                record(0, 0, accepted("{}")),
                record(1, 1000, accepted("{}")),
                record(2, 1000, refused()),
                record(3, 3000, refused()),
            ],
            orders: 2,
            late: 0,
            cpu: Duration::ZERO,
            wall: second(3),
            stored: vec![(second(0), 0), (second(2), 1), (second(5), 2)],
            looks: Vec::new(),
        };
        assert!((crowded.refusals_per_s("sold_out") - 1.0).abs() < f64::EPSILON);
        assert_eq!(crowded.stored_after(), Some(second(5)));
        let orders = [(1, 0), (2, 1000)].map(|(seq, ms)| (seq, Duration::from_millis(ms)));
        assert_eq!(crowded.lags_of(orders.into()), [second(2), second(4)]);
    }
}
