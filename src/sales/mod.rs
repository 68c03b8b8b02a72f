//! What can be done with sales and their orders: the store and the engine together.

mod amend;
mod archive;
mod checkout;
mod commits;
mod demand;
mod gate;
mod line;
mod names;
mod open;
mod pseudonym;
mod receipts;
mod remembered;
mod rounds;
mod till;
mod windows;

use std::{collections::HashMap, sync::Arc, time::Duration};

use uuid::Uuid;

pub use self::{
    amend::RoundChange,
    archive::Archive,
    checkout::{CheckedOut, CheckoutView, Checkouts, LineAnswer, LineSaid},
    commits::Commits,
    demand::Demand,
    gate::{Challenge, Gate},
    line::{LineView, Odds},
    names::BuyerNames,
    open::OpenSales,
    pseudonym::Pseudonyms,
    receipts::{Redemption, StoredReplay},
    rounds::RoundKeeper,
    till::{Paid, PaidCheckout, Till},
    windows::{RoundState, RoundView},
};
use crate::{
    clock,
    domain::{
        durability::Lack,
        hurdles::{Candidate, Hurdle},
        id::{
            BuyerId, Fingerprint, JournalId, OperationId, OrderId, Partition, ProductId, RoundId,
            SaleId,
        },
        model::{Allocated, Controlled, Operation, Release, Released},
        order::{Decision, Durability, Order, Purchase, Refusal, Status},
        proof::Purpose,
        receipt::ReceiptKeys,
        round::{Intent, State, TermsError},
    },
    engine::{Answer, Engine, EngineError, Engines, LeaderboardPage, Standing},
    faults,
    store::{
        StoreError,
        directory::Directory,
        epochs::Epochs,
        journal::Positions,
        orders::{self, Orders},
        rounds::Rounds,
        sales::{self, Inserted, NewSale, SaleChange, SaleChanged, SaleFacts, Sales},
        schedules::Schedules,
    },
    writer::StoredPosition,
};

/// Rounds of a sale that may be archived while one request is decided: more is a fault.
const ARCHIVED_MEANWHILE_MAX: usize = 4;

/// Why something could not be done with a sale.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SaleError {
    /// There is no such sale, order or product, or it is not the caller's.
    #[error("there is nothing with this id")]
    NotFound,
    /// The key has been used for another request.
    #[error("the key belongs to another request")]
    Mismatch,
    /// The product does not exist.
    #[error("there is no such product")]
    NoProduct,
    /// The rules of a round would contradict each other.
    #[error(transparent)]
    Terms(TermsError),
    /// A value of the request does not fit what is there: which, and why.
    #[error("{1}")]
    Range(&'static str, &'static str),
    /// No window of a schedule opens behind the rounds that are made.
    #[error("no window opens behind the rounds that are made")]
    NoWindow,
    /// Somebody else has changed it meanwhile.
    #[error("it has another version")]
    Stale,
    /// The state of things does not allow it.
    #[error("{0}")]
    Conflict(&'static str),
    /// A script looked, and refuses it as it would refuse a purchase, at this instant of Redis' clock,
    /// milliseconds since the Unix epoch.
    #[error("refused")]
    Refused(Refusal, i64),
    /// The buyer does not clear what this sale asks for. Nothing was done.
    #[error("the sale asks for more than the buyer has")]
    Hurdle(SaleId, Hurdle),
    /// Another attempt with the same key is under way.
    #[error("another attempt is under way")]
    Busy,
    /// The allocation would leave its bounds.
    #[error("the allocation would leave its bounds")]
    TooMany,
    /// The units of these orders went back before they were paid.
    #[error("the hold has expired")]
    HoldExpired(Vec<OrderId>),
    /// One payment cannot pay for all of these orders.
    #[error("the orders are not paid the same way")]
    Unlike(Vec<OrderView>),
    /// The sale takes no money, and a payment method was given.
    #[error("the sale takes no payment")]
    NoPayment,
    /// The sale takes money, and no payment method was given.
    #[error("a payment method is needed")]
    NoMethod,
    /// The stores cannot give what the sale promises. Nothing was done.
    #[error(transparent)]
    Lack(#[from] Lack),
    /// PostgreSQL does not store what is accepted, and the sale promises that. Nothing was done.
    #[error("PostgreSQL is behind")]
    Behind,
    /// Accepted, and PostgreSQL does not have it yet, which the sale promises. It may be lost.
    #[error("PostgreSQL does not have it yet")]
    NotStored,
    /// The engine did not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// PostgreSQL did not answer.
    #[error(transparent)]
    Store(Arc<StoreError>),
}

impl From<StoreError> for SaleError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<Arc<StoreError>> for SaleError {
    fn from(error: Arc<StoreError>) -> Self {
        Self::Store(error)
    }
}

/// A sale as it stands.
#[derive(Clone, Debug)]
pub struct SaleView {
    /// The sale in its current round.
    pub facts: Arc<SaleFacts>,
    /// Where the units of its current round are.
    pub standing: Standing,
    /// Why nothing of it is sold, although it may be open.
    pub lack: Option<Lack>,
}

/// An order as it stands.
#[derive(Clone, Debug)]
pub struct OrderView {
    /// The order.
    pub order: Order,
    /// Its sale.
    pub sale: Arc<SaleFacts>,
    /// Whether PostgreSQL has it.
    pub stored: bool,
}

/// Everything that sells.
#[derive(Clone, Debug)]
pub struct Shop {
    /// The engines of all partitions.
    pub engines: Engines,
    /// Sales in memory.
    pub directory: Directory,
    /// Sales in PostgreSQL.
    pub sales: Sales,
    /// Rounds in PostgreSQL.
    pub rounds: Rounds,
    /// When rounds open.
    pub schedules: Schedules,
    /// Orders in PostgreSQL.
    pub orders: Orders,
    /// Up to where PostgreSQL has each journal.
    pub positions: Positions,
    /// The same, as this process' own writers know it without asking.
    pub stored: HashMap<Partition, StoredPosition>,
    /// Waits until PostgreSQL has what was accepted.
    pub commits: Commits,
    /// Keeps out who does not clear the hurdles of a sale.
    pub gate: Gate,
    /// What buyers are called on a leaderboard.
    pub pseudonyms: Pseudonyms,
    /// What was lost when an epoch began.
    pub epochs: Epochs,
    /// What buyers want to be called.
    pub names: BuyerNames,
    /// Who was refused.
    pub demand: Demand,
    /// Which sales of a product may be open.
    pub open: OpenSales,
    /// Signs receipts, and knows its own.
    pub receipts: ReceiptKeys,
    /// What has left Redis.
    pub archive: Archive,
}

/// Why nothing is decided after [`ARCHIVED_MEANWHILE_MAX`] looks.
fn leaving() -> SaleError {
    let reason = "rounds of the sale are being archived".to_owned();
    SaleError::Engine(EngineError::Damaged(reason))
}

impl Shop {
    fn engine(&self, partition: Partition) -> Result<&Engine, SaleError> {
        self.engines
            .of(partition)
            .ok_or(SaleError::Engine(EngineError::Disconnected))
    }

    /// The sale in its current round, if Redis has it.
    async fn facts(&self, id: SaleId) -> Result<Arc<SaleFacts>, SaleError> {
        let facts = self.directory.by_id(id).await?;
        let facts = facts
            .filter(|facts| facts.provisioned)
            .ok_or(SaleError::NotFound)?;
        // The node's estimate is never ahead of Redis' clock: a round that Redis is past answers
        // `closed`, and the next one is asked.
        Ok(match self.engine(facts.partition)?.redis_ms() {
            Some(now_ms) => facts.at(now_ms),
            None => facts,
        })
    }

    /// What time it is where a sale lives, milliseconds since the Unix epoch.
    pub fn now_ms(&self, partition: Partition) -> i64 {
        let engine = self.engines.of(partition);
        engine
            .and_then(Engine::redis_ms)
            .unwrap_or_else(clock::now_ms)
    }

    /// Where a new sale shall live: it stays there for life, however many partitions there are
    /// later.
    pub fn home(&self, id: SaleId) -> Partition {
        let partitions = self.engines.all().len().max(1) as u64;
        Partition(u16::try_from(id.0.as_u64_pair().1 % partitions).unwrap_or(0))
    }

    /// Makes a sale and provisions its first round. Doing it again with the same id is safe.
    ///
    /// Gives the sale and whether an earlier attempt made it.
    ///
    /// # Errors
    /// [`SaleError`]. After an error of the engine the sale exists, and is provisioned as soon as
    /// Redis answers; it is not shown before.
    pub async fn create(&self, sale: NewSale) -> Result<(SaleView, bool), SaleError> {
        let (sale, replayed) = match self.sales.insert(sale).await? {
            Inserted::New(sale) => (sale, false),
            Inserted::Replayed(sale) => (sale, true),
            Inserted::Mismatch => return Err(SaleError::Mismatch),
            Inserted::NoProduct => return Err(SaleError::NoProduct),
        };
        let facts = sale.facts;
        if !facts.provisioned {
            let engine = self.engine(facts.partition)?;
            rounds::provision(engine, &self.rounds, facts.round_id(), &facts.terms).await?;
            self.directory.invalidate(facts.id);
        }
        self.open.forget(facts.product);
        Ok((self.view(facts.id).await?, replayed))
    }

    /// Changes what is said about a sale and what its next rounds are made from, if it has this
    /// version. Rounds that are made keep what they have.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn change(
        &self,
        id: SaleId,
        version: i64,
        change: SaleChange,
    ) -> Result<SaleView, SaleError> {
        let now_ms = self.now_ms(self.facts(id).await?.partition);
        match self.sales.change(id, version, change, now_ms).await? {
            SaleChanged::Done => {}
            SaleChanged::Stale => return Err(SaleError::Stale),
            SaleChanged::Missing => return Err(SaleError::NotFound),
            SaleChanged::Terms(error) => return Err(SaleError::Terms(error)),
            SaleChanged::Final => {
                return Err(SaleError::Conflict(
                    "The sale has no schedule, so no round will be made from this.",
                ));
            }
            SaleChanged::Endless => {
                return Err(SaleError::Conflict(
                    "The present round has no end: close it, then no other can overlap it.",
                ));
            }
            SaleChanged::Over => return Err(SaleError::NoWindow),
        }
        self.directory.invalidate(id);
        self.view(id).await
    }

    /// The sale as it stands, never older than this call.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn view(&self, id: SaleId) -> Result<SaleView, SaleError> {
        self.stand(self.facts(id).await?).await
    }

    /// Of a round that is over, what stands is the round after it.
    async fn stand(&self, mut facts: Arc<SaleFacts>) -> Result<SaleView, SaleError> {
        let engine = self.engine(facts.partition)?;
        loop {
            let standing = engine.snapshot(facts.round_id()).await?;
            match &facts.next {
                Some(next) if standing.state == State::Closed => facts = Arc::clone(next),
                _ => return self.seen(facts, standing),
            }
        }
    }

    fn seen(&self, facts: Arc<SaleFacts>, standing: Standing) -> Result<SaleView, SaleError> {
        let given = self.engine(facts.partition)?.gives(facts.durability);
        let given = given.and_then(|durability| match durability {
            Durability::Committed => self.commits.kept(),
            Durability::Fast | Durability::Fsync | Durability::Replicated => Ok(()),
        });
        Ok(SaleView {
            facts,
            standing,
            lack: given.err(),
        })
    }

    /// A page of sales, newest first, each as it stands.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn list(&self, filter: sales::Filter) -> Result<Vec<SaleView>, SaleError> {
        self.stand_all(self.sales.list(filter).await?).await
    }

    /// The sale of each of these products that is open or paused, if it has one and PostgreSQL and
    /// Redis answer within `patience`: each as it stands, never older than this call.
    pub async fn open_sales(
        &self,
        products: &[ProductId],
        patience: Duration,
    ) -> HashMap<ProductId, SaleView> {
        let sales = match tokio::time::timeout(patience, self.open.of(products)).await {
            Ok(Ok(sales)) => sales,
            // Selling goes on while PostgreSQL is away, and so does showing it.
            Ok(Err(_)) | Err(_) => self.open.as_known(products),
        };
        let standing = sales.into_iter().map(|sale| async {
            let view = tokio::time::timeout(patience, self.stand(sale)).await;
            view.ok()?.ok()
        });
        let views = futures::future::join_all(standing).await;
        let open = |view: &SaleView| {
            let state = view.standing.state;
            matches!(state, State::Open | State::Paused)
        };
        let views = views.into_iter().flatten().filter(open);
        views.map(|view| (view.facts.product, view)).collect()
    }

    /// Snapshots that are asked for together travel together.
    async fn stand_all(&self, sales: Vec<Arc<SaleFacts>>) -> Result<Vec<SaleView>, SaleError> {
        let views = sales.into_iter().map(|facts| self.stand(facts));
        futures::future::try_join_all(views).await
    }

    /// Decides on a purchase. When the round turns out to be over, the next one decides: the order's
    /// id is of the sale, so a key that has its order in any round finds it there.
    ///
    /// # Errors
    /// [`SaleError`]; [`EngineError::may_have_run`] says whether there may be an order.
    pub async fn purchase(
        &self,
        id: SaleId,
        candidate: Candidate<'_>,
        key: &str,
        quantity: u64,
    ) -> Result<(Answer, Arc<SaleFacts>), SaleError> {
        let facts = self.facts(id).await?;
        let buyer = candidate.buyer;
        if facts.hurdles.any()
            && let Some(hurdle) = self.stops(&facts, &candidate, Purpose::Order, key)
        {
            let order = OrderId::derive(facts.number, buyer, key);
            // Boxed, so that nobody else carries its state along.
            Box::pin(self.admit_known(&facts, order, hurdle)).await?;
        }
        self.purchase_anyway(facts, buyer, key, quantity).await
    }

    /// The same for somebody who has cleared every hurdle, now or before.
    async fn purchase_anyway(
        &self,
        mut facts: Arc<SaleFacts>,
        buyer: BuyerId,
        key: &str,
        quantity: u64,
    ) -> Result<(Answer, Arc<SaleFacts>), SaleError> {
        loop {
            let mut answer = self.purchase_in(&facts, buyer, key, quantity).await;
            if let Ok(told) = &mut answer
                && told.decision == Decision::Refused(Refusal::Closed)
            {
                if let Some(next) = &facts.next {
                    facts = Arc::clone(next);
                    continue;
                }
                // Its round is not there yet.
                if let Some(upcoming) = facts.upcoming {
                    let opens_at_ms = upcoming.opens_at_ms;
                    told.decision = Decision::Refused(Refusal::NotOpen { opens_at_ms });
                }
            }
            self.demand.note(facts.round_id(), quantity, &answer);
            return Ok((answer?, facts));
        }
    }

    async fn purchase_in(
        &self,
        facts: &SaleFacts,
        buyer: BuyerId,
        key: &str,
        quantity: u64,
    ) -> Result<Answer, SaleError> {
        let engine = self.engine(facts.partition)?;
        let owner = if faults::bug("key_of_everybody") {
            BuyerId(Uuid::nil())
        } else {
            buyer
        };
        let purchase = Purchase {
            round: facts.round_id(),
            order: OrderId::derive(facts.number, owner, key),
            buyer,
            quantity,
            fingerprint: Fingerprint::of(&[b"order", &quantity.to_be_bytes()]),
            durability: engine.gives(facts.durability)?,
            redeem: false,
            archive: engine.archived_rounds(facts.round_id()),
        };
        self.decide(engine, purchase).await
    }

    /// Has a purchase decided, and gives what may be told of it. PostgreSQL is asked first whether
    /// an archived round has the order.
    async fn decide(&self, engine: &Engine, mut purchase: Purchase) -> Result<Answer, SaleError> {
        let committed = purchase.durability == Durability::Committed;
        if committed {
            // Boxed, so that nobody else carries its state along.
            Box::pin(self.commits.admit(engine)).await?;
        }
        // Each further turn means that one more round was archived meanwhile.
        for _ in 0..ARCHIVED_MEANWHILE_MAX {
            let Purchase {
                order,
                buyer,
                fingerprint,
                archive,
                ..
            } = purchase;
            let (rounds, stored) = self.left(order, buyer, fingerprint, archive).await?;
            purchase.archive = rounds;
            if let Some(decision) = stored.decision() {
                // Stored, and Redis cannot lose it any more: nothing is left to wait for.
                return Ok(Answer {
                    decision,
                    looked_up: true,
                    now_ms: engine.redis_ms().unwrap_or_default(),
                });
            }
            let answer = engine.purchase(purchase).await?;
            match &answer.decision {
                Decision::Refused(Refusal::Archived { rounds }) => {
                    purchase.archive = *rounds;
                    continue;
                }
                // A replay waits, too: nobody knows whether the first answer did.
                Decision::Accepted(order) | Decision::Replayed(order) if committed => {
                    Box::pin(self.commits.wait(engine, order)).await?;
                }
                Decision::Accepted(_) | Decision::Replayed(_) | Decision::Refused(_) => {}
            }
            return Ok(answer);
        }
        Err(leaving())
    }

    /// Looks for an order that may have left Redis with one of at least `archive` archived rounds:
    /// of so many rounds it is known now, and this is what PostgreSQL has under its id.
    async fn left(
        &self,
        order: OrderId,
        buyer: BuyerId,
        fingerprint: Fingerprint,
        archive: u32,
    ) -> Result<(u32, StoredReplay), SaleError> {
        if archive == 0 {
            // Nothing has left, as far as this node knows; Redis says so otherwise.
            return Ok((0, StoredReplay::None));
        }
        if let Some(rounds) = self.archive.rounds_without(order, archive) {
            return Ok((rounds, StoredReplay::None));
        }
        let stored = self.replay_stored(order, buyer, fingerprint).await?;
        Ok((archive, stored))
    }

    /// The order with this id, if it is `buyer`'s; `None` may see every order.
    ///
    /// # Errors
    /// [`SaleError`]. Somebody else's order is not found.
    pub async fn order(&self, id: OrderId, buyer: Option<BuyerId>) -> Result<OrderView, SaleError> {
        let sale = self
            .directory
            .by_number(id.sale())
            .await?
            .ok_or(SaleError::NotFound)?;
        // Redis first: PostgreSQL may not have it yet.
        let order = match self.engine(sale.partition)?.order(id).await? {
            Some(order) => Some(order),
            None => self.orders.by_id(id).await?,
        };
        let order = order.filter(|order| buyer.is_none_or(|buyer| order.buyer == buyer));
        let order = order.ok_or(SaleError::NotFound)?;
        let stored = self.stored(sale.partition, &order).await;
        Ok(OrderView {
            order,
            sale,
            stored,
        })
    }

    /// Whether PostgreSQL has the order. What cannot be found out counts as no.
    async fn stored(&self, partition: Partition, order: &Order) -> bool {
        let at = order.entry();
        // Numbers say something within one epoch only.
        let reached =
            |stored: JournalId| (stored.epoch == at.epoch).then_some(stored.pseq >= at.pseq);
        let known = self.stored.get(&partition).map(StoredPosition::get);
        if known.and_then(reached) == Some(true) {
            return true;
        }
        let Ok(position) = self.positions.of(partition).await else {
            return false;
        };
        if let Some(reached) = reached(position.stored) {
            return reached;
        }
        // What a later epoch has of this one is stored before its own first entry.
        let end = self.epochs.recovered_end(partition, at.epoch).await;
        position.stored.epoch > at.epoch
            && end.is_ok_and(|end| end.is_none_or(|end| at.pseq <= end))
    }

    /// A page of stored orders, each with its sale.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn stored_orders(
        &self,
        sale: Option<SaleId>,
        filter: orders::Filter,
    ) -> Result<Vec<(Order, Arc<SaleFacts>)>, SaleError> {
        let sale = match sale {
            Some(id) => Some(self.facts(id).await?.number),
            None => None,
        };
        let orders = self.orders.list(orders::Filter { sale, ..filter }).await?;
        let mut rows = Vec::with_capacity(orders.len());
        for order in orders {
            let facts = self.directory.by_number(order.round.sale).await?;
            rows.push((order, facts.ok_or(SaleError::NotFound)?));
        }
        Ok(rows)
    }

    /// Gives an order back; its units are for sale again.
    ///
    /// # Errors
    /// [`SaleError`]. Somebody else's order is not found.
    pub async fn cancel(
        &self,
        id: OrderId,
        buyer: Option<BuyerId>,
        actor: Uuid,
    ) -> Result<OrderView, SaleError> {
        let view = self.order(id, buyer).await?;
        let engine = self.engine(view.sale.partition)?;
        let durability = engine.gives(view.sale.durability).ok();
        let (released, _) = engine
            .release(
                view.order.round,
                id,
                Release::Cancel,
                None,
                None,
                durability,
                actor,
            )
            .await?;
        let order = match released {
            Released::Done(order) | Released::Already(order) | Released::Replayed(order) => order,
            Released::Held(_) | Released::TooMany(_) | Released::Mismatch => {
                return Err(SaleError::Mismatch);
            }
            // It was given back before the round was settled.
            Released::Settled if view.order.status == Status::Cancelled => view.order,
            Released::Settled => {
                return Err(SaleError::Conflict(
                    "The round of this order is settled: its orders are final, and no unit goes \
                     back on sale.",
                ));
            }
            // PostgreSQL has it and Redis has not, in a round that has not left.
            Released::Unknown => {
                let reason = format!("order {id} is missing");
                return Err(SaleError::Engine(EngineError::Damaged(reason)));
            }
        };
        Ok(OrderView { order, ..view })
    }

    /// Pauses, resumes or closes the current round.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn control(
        &self,
        id: SaleId,
        intent: Intent,
        actor: Uuid,
    ) -> Result<SaleView, SaleError> {
        let mut facts = self.facts(id).await?;
        let engine = self.engine(facts.partition)?;
        loop {
            let (controlled, standing) = engine.control(facts.round_id(), intent, actor).await?;
            match (controlled, &facts.next) {
                // Who asks twice for the end of a round does not end the one after it.
                (Controlled::Done | Controlled::Already, Some(_)) if intent == Intent::Closed => {
                    return self.stand(facts).await;
                }
                (Controlled::Done | Controlled::Already, _) => return self.seen(facts, standing),
                (Controlled::Closed, Some(next)) => facts = Arc::clone(next),
                (Controlled::Closed, None) => {
                    return Err(SaleError::Conflict("The sale is closed."));
                }
            }
        }
    }

    /// Adds units to the current round, or with `reduce` takes so many of those that remain, once for
    /// each key of an operator. Gives the sale, and whether an earlier attempt did it.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn allocate(
        &self,
        id: SaleId,
        reduce: bool,
        units: u64,
        actor: Uuid,
        key: &str,
    ) -> Result<(SaleView, bool), SaleError> {
        let mut facts = self.facts(id).await?;
        let word = if reduce { "reduce" } else { "restock" };
        let operation = Operation {
            id: OperationId::derive(&format!("{word} {id}"), actor, key),
            fingerprint: Fingerprint::units(word, units),
        };
        let engine = self.engine(facts.partition)?;
        let durability = engine.gives(facts.durability).ok();
        loop {
            let (restocked, standing) = engine
                .allocate(
                    facts.round_id(),
                    reduce,
                    units,
                    operation,
                    durability,
                    actor,
                )
                .await?;
            return match (restocked, &facts.next) {
                (Allocated::Done, _) => Ok((self.seen(facts, standing)?, false)),
                (Allocated::Replayed, _) => Ok((self.seen(facts, standing)?, true)),
                (Allocated::Mismatch, _) => Err(SaleError::Mismatch),
                (Allocated::TooMany, _) if reduce => Err(SaleError::Refused(
                    Refusal::Insufficient {
                        remaining: standing.counters.remaining,
                    },
                    standing.now_ms,
                )),
                (Allocated::TooMany, _) => Err(SaleError::TooMany),
                (Allocated::Closed, Some(next)) => {
                    facts = Arc::clone(next);
                    continue;
                }
                (Allocated::Closed, None) => Err(SaleError::Conflict("The sale is closed.")),
            };
        }
    }

    /// A sale and one of its rounds: the present one, or the last one before it has begun, if none
    /// is named.
    ///
    /// # Errors
    /// [`SaleError`]; a round that the sale does not have is not found.
    pub async fn round(
        &self,
        id: SaleId,
        round: Option<u32>,
    ) -> Result<(Arc<SaleFacts>, RoundId), SaleError> {
        let facts = self.facts(id).await?;
        // Between rounds it is the last one that people want to see.
        let begun = facts.terms.window.opens_at_ms <= self.now_ms(facts.partition);
        let present = if begun { facts.round } else { facts.round - 1 };
        let round = round.unwrap_or(present.max(1));
        if !(1..=facts.last().round).contains(&round) {
            return Err(SaleError::NotFound);
        }
        let sale = facts.number;
        Ok((facts, RoundId { sale, round }))
    }

    /// A page of a round's leaderboard: at most `limit` orders, up to `back` of those accepted until
    /// `after_seq`, then those accepted after it.
    ///
    /// # Errors
    /// [`SaleError`]; a round that the sale does not have is not found.
    pub async fn leaderboard(
        &self,
        id: SaleId,
        round: Option<u32>,
        after_seq: u64,
        back: usize,
        limit: usize,
    ) -> Result<(LeaderboardPage, Arc<SaleFacts>), SaleError> {
        let (facts, round) = self.round(id, round).await?;
        let engine = self.engine(facts.partition)?;
        let page = match engine.leaderboard(round, after_seq, back, limit).await? {
            Some(page) => page,
            None => {
                let number = |n| i64::try_from(n).unwrap_or(i64::MAX);
                let (back, limit) = (number(back), number(limit));
                let page = self.orders.leaderboard(round, after_seq, back, limit);
                let (before, orders) = page.await?;
                LeaderboardPage { before, orders }
            }
        };
        Ok((page, facts))
    }

    /// The same around the first confirmed order of a buyer that PostgreSQL has; `None` without one.
    ///
    /// # Errors
    /// [`SaleError`]; a round that the sale does not have is not found.
    pub async fn leaderboard_around(
        &self,
        id: SaleId,
        round: Option<u32>,
        buyer: BuyerId,
        limit: usize,
    ) -> Result<(Option<LeaderboardPage>, Arc<SaleFacts>), SaleError> {
        let (facts, round) = self.round(id, round).await?;
        let Some(place) = self.orders.first_of(round, buyer).await? else {
            return Ok((None, facts));
        };
        let (before, back) = (place.seq.saturating_sub(1), limit.saturating_sub(1) / 2);
        let page = self.leaderboard(id, Some(round.round), before, back, limit);
        let (page, facts) = page.await?;
        Ok((Some(page), facts))
    }
}
