//! Buying a cart: all of its lines, or none.
//!
//! Lines that live on one partition are decided in one call of the script. Over several partitions
//! each is asked in turn; when one refuses, what the ones before have accepted is withdrawn. The
//! checkout's row is there before the first call, so whoever finds it pending can finish it.

use std::{sync::Arc, time::Duration};

use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{OrderView, SaleError, Shop};
use crate::{
    clock,
    domain::{
        cart::{Line, OrderedLine, merge},
        hurdles::{Candidate, Hurdle},
        id::{BuyerId, Fingerprint, OperationId, OrderId, Partition},
        model::{Release, Released},
        order::{Decision, Durability, Order, Purchase, Refusal, Status},
        proof::Purpose,
    },
    engine::{Answer, Engine},
    faults,
    store::{
        carts::{Cart, Carts, Checkout, CheckoutState, Taken},
        sales::SaleFacts,
    },
};

/// How long somebody who works on a checkout has it to itself: much longer than any call may run.
const LEASE: TimeDelta = TimeDelta::seconds(15);
/// The time between two looks for checkouts that nobody works on.
const PERIOD: Duration = Duration::from_secs(5);
/// Checkouts of one look.
const ABANDONED_MAX: i64 = 100;
/// Rounds that may turn while one cart is decided: more is a fault.
const TURNS_MAX: usize = 8;

/// What became of buying a cart.
#[derive(Clone, Debug)]
pub enum CheckedOut {
    /// Every line is held or bought.
    Accepted {
        /// The checkout.
        id: Uuid,
        /// The orders, in order of the lines.
        orders: Vec<(Order, Arc<SaleFacts>)>,
        /// Whether an earlier attempt with the same key did it.
        replayed: bool,
    },
    /// Nothing is held. The key may try again.
    Refused(Vec<LineAnswer>),
    /// Nothing is held any more, and the key tells so for ever: why, as it was told first.
    Failed(serde_json::Value),
}

/// What was decided on a line.
#[derive(Clone, Debug)]
pub struct LineAnswer {
    /// The line.
    pub line: Line,
    /// What was said.
    pub said: LineSaid,
}

/// What there is to say of a line.
#[derive(Clone, Debug)]
pub enum LineSaid {
    /// There is no such sale.
    NoSale,
    /// The sale asks for more than the buyer has.
    Hurdle(Hurdle),
    /// This was decided.
    Decided(Answer),
}

/// A checkout as it stands.
#[derive(Clone, Debug)]
pub struct CheckoutView {
    /// The checkout.
    pub checkout: Checkout,
    /// The orders of one that was accepted, as they are now, in order of the lines.
    pub orders: Vec<OrderView>,
}

/// Buys carts.
#[derive(Clone, Debug)]
pub struct Checkouts {
    /// Decides.
    pub shop: Arc<Shop>,
    /// What is to be bought.
    pub carts: Carts,
}

/// A line with the round that it buys from.
struct Wanted {
    at: usize,
    ordered: OrderedLine,
    facts: Arc<SaleFacts>,
}

impl Checkouts {
    /// A buyer's cart.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn cart(&self, buyer: BuyerId) -> Result<Cart, SaleError> {
        Ok(self.carts.get(buyer).await?)
    }

    /// Puts lines into a buyer's cart in place of what is there, if it has this version.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn fill(
        &self,
        buyer: BuyerId,
        lines: Vec<Line>,
        version: Option<i64>,
    ) -> Result<Cart, SaleError> {
        let cart = self.carts.put(buyer, lines, version).await?;
        cart.ok_or(SaleError::Stale)
    }

    /// Buys what is in the cart, once for each key.
    ///
    /// `told` makes what is kept of a failure: the key tells it again.
    ///
    /// # Errors
    /// [`SaleError`]; when something may have been accepted, a retry or [`Checkouts::run`] ends it.
    pub async fn checkout(
        &self,
        candidate: Candidate<'_>,
        key: &str,
        told: impl Fn(&[LineAnswer]) -> serde_json::Value,
    ) -> Result<CheckedOut, SaleError> {
        let id = OperationId::derive("checkout", candidate.buyer.0, key).0;
        let begun = match self.carts.checkout(id).await? {
            // Whoever has begun has cleared all hurdles.
            Some(known) => known,
            None => match self.plan(id, &candidate, key).await? {
                Ok(planned) => planned,
                Err(stopped) => return Ok(CheckedOut::Refused(stopped)),
            },
        };
        let checkout = match self.carts.take(begun, clock::now(), LEASE).await? {
            Taken::Mine(checkout) => checkout,
            Taken::Over(checkout) => {
                return match checkout.state {
                    CheckoutState::Failed(reasons) => Ok(CheckedOut::Failed(reasons)),
                    CheckoutState::Accepted | CheckoutState::Pending => {
                        self.accepted(&checkout, true).await
                    }
                };
            }
            Taken::Busy => return Err(SaleError::Busy),
        };
        faults::point("checkout.after_row");
        self.buy(checkout, told).await
    }

    /// What is to be bought, with the ids of its orders; the lines of sales that are not there, or
    /// that ask for more than the buyer has.
    async fn plan(
        &self,
        id: Uuid,
        candidate: &Candidate<'_>,
        key: &str,
    ) -> Result<Result<Checkout, Vec<LineAnswer>>, SaleError> {
        let buyer = candidate.buyer;
        let cart = self.carts.get(buyer).await?;
        if cart.lines.is_empty() {
            return Err(SaleError::Conflict("The cart is empty."));
        }
        // They were put in as they are; a cart of an older build may not be.
        let merged = merge(&cart.lines).unwrap_or(cart.lines);
        let mut lines = Vec::with_capacity(merged.len());
        let mut stopped = Vec::new();
        for line in merged {
            let facts = match self.shop.facts(line.sale).await {
                Ok(facts) => facts,
                Err(SaleError::NotFound) => {
                    let said = LineSaid::NoSale;
                    stopped.push(LineAnswer { line, said });
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some(hurdle) = self.shop.stops(&facts, candidate, Purpose::Checkout, key) {
                let said = LineSaid::Hurdle(hurdle);
                stopped.push(LineAnswer { line, said });
            }
            lines.push(OrderedLine {
                line,
                // No key of a purchase has such a beginning.
                order: OrderId::derive(facts.number, buyer, &format!("\u{1}checkout {key}")),
            });
        }
        if !stopped.is_empty() {
            return Ok(Err(stopped));
        }
        Ok(Ok(Checkout {
            id,
            buyer,
            lines,
            state: CheckoutState::Pending,
            cart_version: cart.version,
        }))
    }

    async fn buy(
        &self,
        checkout: Checkout,
        told: impl Fn(&[LineAnswer]) -> serde_json::Value,
    ) -> Result<CheckedOut, SaleError> {
        let mut groups: Vec<(Partition, Vec<Wanted>)> = Vec::new();
        for (at, ordered) in checkout.lines.iter().enumerate() {
            let facts = self.shop.facts(ordered.line.sale).await?;
            let wanted = Wanted {
                at,
                ordered: *ordered,
                facts: Arc::clone(&facts),
            };
            match groups.iter_mut().find(|(home, _)| *home == facts.partition) {
                Some((_, group)) => group.push(wanted),
                None => groups.push((facts.partition, vec![wanted])),
            }
        }
        // Always in the same order, so that a retry finds what is there.
        groups.sort_by_key(|(partition, _)| *partition);
        let mut held = false;
        let mut answers: Vec<Option<Answer>> = vec![None; checkout.lines.len()];
        for (partition, group) in &mut groups {
            let engine = self.shop.engine(*partition)?;
            let decided = self.decide(engine, checkout.buyer, group).await?;
            faults::point("checkout.after_group");
            let accepted = decided.iter().all(|answer| is_there(&answer.decision));
            for (wanted, answer) in group.iter().zip(decided) {
                // An order that was withdrawn was there once.
                held |= matches!(
                    answer.decision,
                    Decision::Accepted(_) | Decision::Replayed(_)
                );
                if let Some(place) = answers.get_mut(wanted.at) {
                    *place = Some(answer);
                }
            }
            if !accepted {
                let reasons = reasons(&checkout, &answers);
                if !held {
                    self.carts.forget(checkout.id).await?;
                    return Ok(CheckedOut::Refused(reasons));
                }
                self.withdraw(&checkout).await?;
                let reasons = told(&reasons);
                let failed = CheckoutState::Failed(reasons.clone());
                self.carts.end(&checkout, failed).await?;
                return Ok(CheckedOut::Failed(reasons));
            }
        }
        self.carts.end(&checkout, CheckoutState::Accepted).await?;
        faults::point("checkout.after_end");
        self.accepted(&checkout, false).await
    }

    /// Has the lines of one partition decided together. A line whose round is over is decided in the
    /// round after it.
    async fn decide(
        &self,
        engine: &Engine,
        buyer: BuyerId,
        group: &mut [Wanted],
    ) -> Result<Vec<Answer>, SaleError> {
        for _ in 0..TURNS_MAX {
            let mut purchases = Vec::with_capacity(group.len());
            for wanted in group.iter() {
                let quantity = wanted.ordered.line.quantity;
                purchases.push(Purchase {
                    round: wanted.facts.round_id(),
                    order: wanted.ordered.order,
                    buyer,
                    quantity,
                    fingerprint: Fingerprint::units("checkout", quantity),
                    durability: engine.gives(wanted.facts.durability)?,
                    redeem: false,
                    // The checkout's row says that no older round has the order.
                    archive: u32::MAX,
                });
            }
            let committed = |purchase: &Purchase| purchase.durability == Durability::Committed;
            if purchases.iter().any(committed) {
                self.shop.commits.admit(engine).await?;
            }
            let answers = engine.purchase_together(&purchases).await?;
            let mut turned = false;
            for (wanted, answer) in group.iter_mut().zip(&answers) {
                let over = matches!(answer.decision, Decision::Refused(Refusal::Closed));
                if let Some(next) = wanted.facts.next.as_ref().filter(|_| over) {
                    wanted.facts = Arc::clone(next);
                    turned = true;
                }
            }
            if turned {
                continue;
            }
            for (purchase, answer) in purchases.iter().zip(&answers) {
                let told = Ok::<_, SaleError>(*answer);
                self.shop
                    .demand
                    .note(purchase.round, purchase.quantity, &told);
                if let Decision::Accepted(order) | Decision::Replayed(order) = &answer.decision
                    && committed(purchase)
                {
                    self.shop.commits.wait(engine, order).await?;
                }
            }
            return Ok(answers);
        }
        Err(SaleError::Busy)
    }

    /// Takes back every order of a checkout that is there; whether there was one.
    async fn withdraw(&self, checkout: &Checkout) -> Result<bool, SaleError> {
        let mut any = false;
        for ordered in &checkout.lines {
            let facts = self.shop.facts(ordered.line.sale).await?;
            let engine = self.shop.engine(facts.partition)?;
            let Some(order) = engine.order(ordered.order).await? else {
                continue;
            };
            let durability = engine.gives(facts.durability).ok();
            let (released, _) = engine
                .release(
                    order.round,
                    order.id,
                    Release::Withdraw,
                    None,
                    None,
                    durability,
                    checkout.buyer.0,
                )
                .await?;
            any |= !matches!(released, Released::Unknown);
            faults::point("checkout.after_withdrawal");
        }
        Ok(any)
    }

    /// The checkout with this id, if it is `buyer`'s; `None` may see every checkout.
    ///
    /// # Errors
    /// [`SaleError`]. Somebody else's checkout is not found.
    pub async fn view(&self, id: Uuid, buyer: Option<BuyerId>) -> Result<CheckoutView, SaleError> {
        let checkout = self.carts.checkout(id).await?;
        let checkout = checkout.filter(|known| buyer.is_none_or(|buyer| known.buyer == buyer));
        let checkout = checkout.ok_or(SaleError::NotFound)?;
        let mut orders = Vec::new();
        if checkout.state == CheckoutState::Accepted {
            for ordered in &checkout.lines {
                orders.push(self.shop.order(ordered.order, None).await?);
            }
        }
        Ok(CheckoutView { checkout, orders })
    }

    /// The orders of an accepted checkout.
    async fn accepted(&self, checkout: &Checkout, replayed: bool) -> Result<CheckedOut, SaleError> {
        let mut orders = Vec::with_capacity(checkout.lines.len());
        for ordered in &checkout.lines {
            let view = self.shop.order(ordered.order, None).await?;
            orders.push((view.order, view.sale));
        }
        Ok(CheckedOut::Accepted {
            id: checkout.id,
            orders,
            replayed,
        })
    }

    /// Ends checkouts that nobody works on any more, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let looking = async {
            loop {
                tokio::time::sleep(PERIOD).await;
                match self
                    .carts
                    .abandoned(clock::now(), LEASE, ABANDONED_MAX)
                    .await
                {
                    Ok(checkouts) => {
                        for checkout in checkouts {
                            if let Err(error) = self.finish(&checkout).await {
                                tracing::debug!(checkout = %checkout.id, %error, "not ended yet");
                            }
                        }
                    }
                    Err(error) => tracing::debug!(%error, "checkouts cannot be looked for"),
                }
            }
        };
        let _: Option<()> = stop.run_until_cancelled(looking).await;
    }

    /// Ends a checkout whose node has gone. No call for it can still run: the lease outlives all.
    async fn finish(&self, checkout: &Checkout) -> Result<(), SaleError> {
        let mut there = 0;
        for ordered in &checkout.lines {
            let facts = self.shop.facts(ordered.line.sale).await?;
            let order = self.shop.engine(facts.partition)?.order(ordered.order);
            let order = order.await?;
            there += usize::from(order.is_some_and(|order| order.status != Status::Withdrawn));
        }
        if there == checkout.lines.len() {
            tracing::info!(checkout = %checkout.id, "an abandoned checkout was accepted");
            self.carts.end(checkout, CheckoutState::Accepted).await?;
        } else if self.withdraw(checkout).await? {
            tracing::info!(checkout = %checkout.id, "an abandoned checkout was withdrawn");
            let reasons = CheckoutState::Failed(serde_json::Value::Array(vec![]));
            self.carts.end(checkout, reasons).await?;
        } else {
            self.carts.forget(checkout.id).await?;
        }
        Ok(())
    }
}

/// What is said of a line that nobody asked for any more, because another could not be had.
const NOT_ASKED: Answer = Answer {
    decision: Decision::Refused(Refusal::LeftOut),
    looked_up: false,
    now_ms: 0,
};

/// What was decided on each line; those behind the partition that refused were not asked about.
fn reasons(checkout: &Checkout, answers: &[Option<Answer>]) -> Vec<LineAnswer> {
    let lines = checkout.lines.iter().zip(answers);
    let answered = lines.map(|(ordered, answer)| LineAnswer {
        line: ordered.line,
        said: LineSaid::Decided(answer.unwrap_or(NOT_ASKED)),
    });
    answered.collect()
}

/// Whether the order of a line is there, and was not withdrawn.
fn is_there(decision: &Decision) -> bool {
    match decision {
        Decision::Accepted(_) => true,
        Decision::Replayed(order) => order.status != Status::Withdrawn,
        Decision::Refused(_) => false,
    }
}
