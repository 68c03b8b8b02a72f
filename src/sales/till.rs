//! Paying for orders: reserve the money, confirm the order, take the money, and whatever has to be
//! done when one of them does not work out. `src/domain/payment.rs` decides what comes next; this
//! does it, and writes it down before it goes on.
//!
//! Each step is taken from the payment's row alone, so whoever finds a payment with something left
//! to do can do it: the request that began it, a webhook's, or the next look of any node.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use reqwest::header::HeaderMap;
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{OrderView, SaleError, Shop};
use crate::{
    clock,
    domain::{
        id::{BuyerId, Fingerprint, OperationId, OrderId, PaymentId},
        model::{Confirmed, Extended, Operation, Release, Released},
        money::Money,
        order::{Decision, Order, Status},
        payment::{Charge, Decline, Fact, Gateway as Name, Seen, State, Todo},
    },
    engine::Engine,
    faults,
    payments::{
        Found, Gateway, Gateways, Guarded, Refund as GiveBack, Sandbox, Trouble, Unverified,
    },
    store::payments::{
        Begun, Cause, Change, Fate, NewPayment, PaidOrder, Payment, Payments, Refund, RefundChange,
        RefundState,
    },
};

/// For so long a payment belongs to whoever works on it: longer than a step can take.
const LEASE: Duration = Duration::from_secs(20);
/// The time between two looks for payments with something left to do.
const PERIOD: Duration = Duration::from_millis(500);
/// The time between two looks at a payment that another request works on.
const GLANCE: Duration = Duration::from_millis(50);
/// Payments of one look, and at the same time.
const TAKEN_MAX: i64 = 32;
const AT_ONCE: usize = 8;
/// Steps of a payment in one go: a whole life has fewer.
const STEPS_MAX: usize = 24;
/// The pause after a trouble, doubled with each further one.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// How often names of old webhooks are let go.
const TIDY: Duration = Duration::from_hours(1);

/// What came of asking for a payment.
#[derive(Clone, Debug)]
pub struct Paid {
    /// The order as it is now.
    pub order: OrderView,
    /// The payment; `None` when no money is asked for.
    pub payment: Option<Payment>,
}

/// What came of asking for the payment of a checkout.
#[derive(Clone, Debug)]
pub struct PaidCheckout {
    /// Its orders as they are now, in order of the lines.
    pub orders: Vec<OrderView>,
    /// The payment; `None` when no money is asked for.
    pub payment: Option<Payment>,
    /// Orders that expired before they were paid: because of them nothing is.
    pub lapsed: Vec<OrderId>,
}

/// Takes payments, for all sales.
#[derive(Debug)]
pub struct Till {
    /// Confirms and takes back.
    pub shop: Arc<Shop>,
    /// What is left to do.
    pub payments: Payments,
    /// Who moves the money.
    pub gateways: Gateways,
    /// The toy bank, which has to be asked for its webhooks.
    pub sandbox: Option<Arc<Sandbox>>,
    /// How long a request waits for what becomes of its payment.
    pub patience: Duration,
    /// Says that something is due now.
    pub due: Notify,
}

/// What a step has brought to light.
#[derive(Debug, Default)]
struct Learnt {
    fact: Option<Fact>,
    reference: Option<String>,
    found: Option<Found>,
    fates: Vec<(OrderId, Fate)>,
    bought: Vec<PaidOrder>,
    refund: Option<RefundChange>,
    /// It was only asked for, nothing was done.
    looked: bool,
    /// Nothing happened, and it has to be tried again later.
    trouble: Option<Trouble>,
}

impl Learnt {
    fn fact(fact: Fact) -> Self {
        Self {
            fact: Some(fact),
            ..Self::default()
        }
    }

    fn found(found: Found) -> Self {
        Self {
            fact: Some(Fact::Seen(found.seen)),
            found: Some(found),
            ..Self::default()
        }
    }

    fn declined(decline: Decline) -> Self {
        Self {
            fact: Some(Fact::Gone),
            found: Some(Seen::Declined(decline).into()),
            ..Self::default()
        }
    }
}

impl From<Trouble> for Learnt {
    fn from(trouble: Trouble) -> Self {
        Self {
            fact: matches!(trouble, Trouble::Disagrees(_)).then_some(Fact::Disagrees),
            trouble: Some(trouble),
            ..Self::default()
        }
    }
}

/// Somewhere between the stores something did not answer: as good as a gateway that did not.
impl From<SaleError> for Learnt {
    fn from(error: SaleError) -> Self {
        Trouble::Unknown(error.to_string()).into()
    }
}

impl Till {
    /// Pays for an order, once for its key. Waits for what becomes of it, but not for ever: what
    /// takes longer goes on by itself.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn pay(
        self: &Arc<Self>,
        id: OrderId,
        buyer: BuyerId,
        key: &str,
        method: Option<String>,
    ) -> Result<Paid, SaleError> {
        let view = self.shop.order(id, Some(buyer)).await?;
        if takes_money(&view).is_none() {
            if method.is_some() {
                return Err(SaleError::NoPayment);
            }
            let order = self.confirmed(&view.order, buyer.0).await?;
            return Ok(Paid {
                order: OrderView { order, ..view },
                payment: None,
            });
        }
        let payment = PaymentId::derive(&format!("order {id}"), buyer, key);
        let due = payable(&view.order).and_then(|()| Due::of(&[&view]));
        let payment = self.charge(payment, buyer, method, due).await?;
        Ok(Paid {
            order: self.shop.order(id, Some(buyer)).await?,
            payment: Some(payment),
        })
    }

    /// Pays for all orders of a checkout that wait for it, with one payment, once for its key: all
    /// of them or none.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn pay_checkout(
        self: &Arc<Self>,
        id: Uuid,
        orders: &[OrderView],
        buyer: BuyerId,
        key: &str,
        method: Option<String>,
    ) -> Result<PaidCheckout, SaleError> {
        let due = self.held(orders);
        let payment = if orders.iter().any(|view| takes_money(view).is_some()) {
            let payment = PaymentId::derive(&format!("checkout {id}"), buyer, key);
            let due = due.and_then(|held| Due::of(&held));
            Some(self.charge(payment, buyer, method, due).await?)
        } else if method.is_some() {
            return Err(SaleError::NoPayment);
        } else {
            for view in due? {
                self.confirmed(&view.order, buyer.0).await?;
            }
            None
        };
        let mut now = Vec::with_capacity(orders.len());
        for view in orders {
            now.push(self.shop.order(view.order.id, Some(buyer)).await?);
        }
        let mut lapsed = Vec::new();
        if let Some(payment) = &payment {
            for paid in self.payments.orders(payment.id).await? {
                let view = now.iter().find(|view| view.order.id == paid.order);
                let late = match view.map(|view| view.order.status) {
                    Some(Status::Expired) => true,
                    Some(Status::Held) => paid.fate == Fate::Gone,
                    _ => false,
                };
                if late {
                    lapsed.push(paid.order);
                }
            }
        }
        Ok(PaidCheckout {
            orders: now,
            payment,
            lapsed,
        })
    }

    /// Those of a checkout's orders that wait for their payment.
    fn held<'a>(&self, orders: &'a [OrderView]) -> Result<Vec<&'a OrderView>, SaleError> {
        let lapsed = |view: &OrderView| match view.order.status {
            Status::Expired => true,
            // The sweeper has not come by yet.
            Status::Held => {
                let until_ms = view.order.hold_until_ms();
                until_ms.is_some_and(|until_ms| until_ms <= self.shop.now_ms(view.sale.partition))
            }
            _ => false,
        };
        let lapsed: Vec<_> = orders.iter().filter(|view| lapsed(view)).collect();
        if lapsed.is_empty() {
            let held = |view: &&OrderView| view.order.status == Status::Held;
            return Ok(orders.iter().filter(held).collect());
        }
        let lapsed = lapsed.iter().map(|view| view.order.id).collect();
        Err(SaleError::HoldExpired(lapsed))
    }

    /// Begins a payment, or goes on with the one that has this id. What is due matters only to one
    /// that begins.
    async fn charge(
        self: &Arc<Self>,
        id: PaymentId,
        buyer: BuyerId,
        method: Option<String>,
        due: Result<Due, SaleError>,
    ) -> Result<Payment, SaleError> {
        let method = method.ok_or(SaleError::NoMethod)?;
        let fingerprint = Fingerprint::of(&[b"pay", method.as_bytes()]);
        let payment = match self.payments.by_id(id).await? {
            Some(known) => (known, false),
            None => {
                let due = due?;
                let new = NewPayment {
                    id,
                    gateway: due.gateway,
                    buyer,
                    method,
                    fingerprint,
                    money: due.money,
                    orders: due.orders,
                };
                self.begin(new).await?
            }
        };
        let (payment, fresh) = payment;
        if payment.fingerprint != fingerprint {
            return Err(SaleError::Mismatch);
        }
        // Over: only the gateway could say otherwise, and it does so by itself.
        if !fresh && payment.course.next() == Todo::Nothing {
            return Ok(payment);
        }
        // It goes on when the client leaves, and when it takes too long to wait for.
        let till = Arc::clone(self);
        let work = tokio::spawn(async move { till.work(payment, fresh).await });
        let settled = async {
            let mut payment = match work.await {
                Ok(worked) => worked?,
                Err(_) => self.present(id).await?,
            };
            // Another attempt with the same key works on it, and knows more in a moment.
            while !matches!(payment.course.next(), Todo::Nothing | Todo::Wait)
                && payment.trouble.is_none()
            {
                sleep(GLANCE).await;
                payment = self.present(id).await?;
            }
            Ok(payment)
        };
        match timeout(self.patience, settled).await {
            Ok(settled) => settled,
            Err(_) => self.present(id).await,
        }
    }

    /// Writes a payment down, or finds it; whether it is new.
    async fn begin(&self, new: NewPayment) -> Result<(Payment, bool), SaleError> {
        let begun = match self.payments.begin(new.clone(), LEASE).await? {
            Begun::Busy(other) => {
                self.give_up(other).await?;
                self.payments.begin(new, LEASE).await?
            }
            begun => begun,
        };
        faults::point("pay.after_intent");
        match begun {
            Begun::New(payment) => Ok((payment, true)),
            Begun::Known(payment) => Ok((payment, false)),
            Begun::Busy(_) => Err(SaleError::Conflict(BUSY)),
        }
    }

    /// Ends a payment for which the buyer was to do something and does something else: another try
    /// to pay may begin.
    async fn give_up(&self, id: PaymentId) -> Result<(), SaleError> {
        let payment = self.payments.by_id(id).await?;
        let waits = payment.filter(|payment| payment.course.state == State::RequiresAction);
        let payment = waits.ok_or(SaleError::Conflict(BUSY))?;
        if let Some(payment) = self.write(payment, Learnt::fact(Fact::Gone)).await? {
            self.work(payment, true).await?;
        }
        Ok(())
    }

    /// Confirms an order that nobody pays money for.
    async fn confirmed(&self, order: &Order, actor: Uuid) -> Result<Order, SaleError> {
        match self.shop.confirm(order, actor).await? {
            Some(order) if order.status == Status::Confirmed => Ok(order),
            Some(order) => {
                payable(&order)?;
                Err(SaleError::HoldExpired(vec![order.id]))
            }
            None => Err(SaleError::NotFound),
        }
    }

    /// Gives an order back, and what was or is just being paid for it.
    ///
    /// # Errors
    /// [`SaleError`]. Somebody else's order is not found.
    pub async fn cancel(
        self: &Arc<Self>,
        id: OrderId,
        buyer: Option<BuyerId>,
        actor: Uuid,
    ) -> Result<Paid, SaleError> {
        let view = self.shop.order(id, buyer).await?;
        let payment = self.payment(&view).await?;
        let live = payment.filter(|payment| payment.course.state.is_live());
        let Some(payment) = live else {
            let order = self.shop.cancel(id, buyer, actor).await?;
            let payment = self.payment(&order).await?;
            return Ok(Paid { order, payment });
        };
        // Noted before the units go back: should the order be confirmed and paid at this moment, the
        // money follows them.
        let refund = Refund {
            id: OperationId::derive(&format!("cancel {id}"), Uuid::nil(), "").0,
            payment: payment.id,
            order: Some(id),
            cause: Cause::Cancel,
            state: RefundState::Asked,
            quantity: None,
            amount: 0,
            reason: None,
            units_return: true,
            actor: Some(actor),
            fingerprint: Fingerprint::of(&[b"cancel"]),
            tries: 0,
        };
        self.payments.ask_refund(refund, LEASE).await?;
        faults::point("pay.after_refund_intent");
        let order = self.shop.cancel(id, buyer, actor).await?;
        faults::point("pay.after_units_back");
        let payment = self.go_on(payment.id).await?;
        Ok(Paid {
            order,
            payment: Some(payment),
        })
    }

    /// Works on a payment for as long as a request may take; what takes longer goes on by itself.
    async fn go_on(self: &Arc<Self>, id: PaymentId) -> Result<Payment, SaleError> {
        let till = Arc::clone(self);
        let work = tokio::spawn(async move {
            loop {
                let payment = till.present(id).await?;
                let fresh = payment.course.state.is_final();
                let payment = till.work(payment, fresh).await?;
                let refunds = till.payments.refunds(id).await?;
                let mut refunds = refunds.into_iter();
                let asked = refunds.any(|refund| refund.state == RefundState::Asked);
                // Else somebody was faster, who may not have heard of it.
                let waits = asked && payment.course.next() == Todo::Nothing;
                if !waits || payment.trouble.is_some() {
                    return Ok::<_, SaleError>(());
                }
                sleep(GLANCE).await;
            }
        });
        let _ = timeout(self.patience, work).await;
        self.present(id).await
    }

    /// Notes a refund, and works on it for as long as a request may take.
    async fn give_back(self: &Arc<Self>, refund: Refund) -> Result<Paid, SaleError> {
        let (payment, order) = (refund.payment, refund.order.ok_or(SaleError::NotFound)?);
        let fingerprint = refund.fingerprint;
        let asked = self.payments.ask_refund(refund, LEASE).await?;
        if asked.fingerprint != fingerprint {
            return Err(SaleError::Mismatch);
        }
        faults::point("pay.after_refund_intent");
        let now = self.go_on(payment).await?;
        let refunds = self.payments.refunds(payment).await?;
        let after = refunds.into_iter().find(|refund| refund.id == asked.id);
        if after.is_some_and(|refund| refund.state == RefundState::Refused) {
            return Err(SaleError::Conflict("There is nothing to give back."));
        }
        Ok(Paid {
            order: self.shop.order(order, None).await?,
            payment: Some(now),
        })
    }

    /// Gives some units of an order back, or all, and what was paid for them: once for each key of
    /// an operator.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn refund(
        self: &Arc<Self>,
        id: OrderId,
        operator: Uuid,
        key: &str,
        quantity: Option<u64>,
        reason: Option<String>,
    ) -> Result<Paid, SaleError> {
        let view = self.shop.order(id, None).await?;
        let payment = self.payment(&view).await?;
        let payment = payment
            .filter(|payment| payment.course.captured > 0)
            .ok_or(SaleError::Conflict("The order is not paid."))?;
        let fingerprint = Fingerprint::of(&[
            b"refund",
            &quantity.unwrap_or(0).to_be_bytes(),
            reason.as_deref().unwrap_or_default().as_bytes(),
        ]);
        let refund = Refund {
            id: OperationId::derive(&format!("refund {id}"), operator, key).0,
            payment: payment.id,
            order: Some(id),
            cause: Cause::Refund,
            state: RefundState::Asked,
            quantity,
            amount: 0,
            reason,
            units_return: view.sale.refund_returns_units,
            actor: Some(operator),
            fingerprint,
            tries: 0,
        };
        self.give_back(refund).await
    }

    /// The payment of an order, for whoever may see the order.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn payment(&self, view: &OrderView) -> Result<Option<Payment>, SaleError> {
        match view.sale.payment {
            Some(_) => Ok(self.payments.of_order(view.order.id).await?),
            None => Ok(None),
        }
    }

    /// Notes a webhook, and has somebody look at its payment. `false` if it had come before.
    ///
    /// # Errors
    /// [`Unverified`] when it is not to be believed, or cannot be noted.
    pub async fn webhook(
        &self,
        gateway: Name,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<bool, Unverified> {
        let Some(guarded) = self.gateways.of(gateway) else {
            return Err(Unverified::Unreadable(format!(
                "{gateway} is not configured"
            )));
        };
        let notice = guarded
            .webhook(headers, body, clock::now().timestamp())
            .await?;
        let new = self
            .payments
            .note(gateway, notice.id, notice.kind, notice.reference)
            .await
            .map_err(|error| Unverified::Later(error.to_string()))?;
        if new {
            self.due.notify_one();
        }
        Ok(new)
    }

    /// Goes on with every payment that has something left to do, until `stop`. Dropped anywhere, a
    /// payment has its step left, and its lease runs out.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        stop.run_until_cancelled(self.go_on_with_all()).await;
    }

    async fn go_on_with_all(self: &Arc<Self>) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tidy = interval(TIDY);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.due.notified() => {}
                _ = period.tick() => {}
                _ = tidy.tick() => {
                    if let Err(error) = self.payments.forget_events().await {
                        tracing::debug!(%error, "old webhooks stay");
                    }
                }
            }
            self.once().await;
        }
    }

    async fn once(self: &Arc<Self>) {
        if let Some(sandbox) = &self.sandbox {
            match sandbox.webhooks(TAKEN_MAX).await {
                Ok(webhooks) => {
                    for (headers, body) in webhooks {
                        if let Err(error) = self.webhook(Name::Sandbox, &headers, &body).await {
                            tracing::debug!(%error, "a webhook of the sandbox is lost");
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "the sandbox has no answer"),
            }
        }
        match self.payments.take(TAKEN_MAX, LEASE).await {
            Ok(due) => {
                let full = i64::try_from(due.len()) == Ok(TAKEN_MAX);
                stream::iter(due)
                    .for_each_concurrent(AT_ONCE, async |payment| {
                        let id = payment.id;
                        if let Err(error) = self.work(payment, false).await {
                            tracing::debug!(%error, payment = %id, "a payment has to wait");
                        }
                    })
                    .await;
                if full {
                    self.due.notify_one();
                }
            }
            Err(error) => tracing::debug!(%error, "payments cannot be looked for"),
        }
    }

    /// Works on a payment until nothing is left to do at once. `fresh`: nothing can have happened at
    /// the gateway that is not written down.
    async fn work(&self, mut payment: Payment, fresh: bool) -> Result<Payment, SaleError> {
        let Some(gateway) = self.gateways.of(payment.gateway).cloned() else {
            let why = "its gateway is not configured any more".to_owned();
            let learnt = Learnt::from(Trouble::Unavailable {
                reason: why,
                after: PAUSE_MAX,
            });
            return Ok(self
                .write(payment.clone(), learnt)
                .await?
                .unwrap_or(payment));
        };
        let mut given_back = None;
        if payment.course.opened && !fresh {
            let learnt = match gateway.look(&payment.charge()).await {
                Ok(found) => {
                    if let Seen::Captured { refunded, .. } = found.seen {
                        given_back = Some(refunded);
                    }
                    Learnt {
                        looked: true,
                        ..Learnt::found(found)
                    }
                }
                Err(trouble) => trouble.into(),
            };
            let blind = learnt.trouble.is_some() && learnt.fact.is_none();
            match self.write(payment.clone(), learnt).await? {
                Some(_) if blind => return self.present(payment.id).await,
                Some(next) => payment = next,
                // Somebody else has learnt more.
                None => return self.present(payment.id).await,
            }
        }
        for _ in 0..STEPS_MAX {
            let before = payment.course;
            let Some(learnt) = self.step(&gateway, &payment, given_back).await? else {
                return Ok(payment);
            };
            let troubled = learnt.trouble.is_some();
            let refund = learnt.refund.is_some();
            match self.write(payment.clone(), learnt).await? {
                Some(next) => payment = next,
                None => return self.present(payment.id).await,
            }
            // Without any progress there is no point in going on at once.
            if (troubled || !refund) && payment.course == before {
                return Ok(payment);
            }
        }
        Ok(payment)
    }

    async fn present(&self, id: PaymentId) -> Result<Payment, SaleError> {
        let payment = self.payments.by_id(id).await?;
        payment.ok_or(SaleError::NotFound)
    }

    /// Takes the next step; `None` when there is none at the moment.
    async fn step(
        &self,
        gateway: &Guarded,
        payment: &Payment,
        given_back: Option<i64>,
    ) -> Result<Option<Learnt>, SaleError> {
        let charge = payment.charge();
        let learnt = match payment.course.next() {
            Todo::Open => self.open(gateway, payment, &charge).await,
            Todo::Authorise => match self.gone(payment).await {
                Ok(true) => Learnt::fact(Fact::Gone),
                Ok(false) => {
                    let answer = gateway.authorise(&charge).await;
                    faults::point("pay.after_authorise");
                    match answer {
                        // It has definitely not happened: another method may do better.
                        Err(Trouble::Refused(why)) => {
                            tracing::info!(payment = %payment.id, why, "a payment was refused");
                            Learnt::declined(Decline::InvalidMethod)
                        }
                        answer => answer.map_or_else(Learnt::from, Learnt::found),
                    }
                }
                Err(error) => error.into(),
            },
            Todo::Wait => match self.gone(payment).await {
                Ok(true) => Learnt::fact(Fact::Gone),
                Ok(false) => return Ok(None),
                Err(error) => error.into(),
            },
            Todo::Confirm => {
                let learnt = self.confirm(payment).await.unwrap_or_else(Learnt::from);
                faults::point("pay.after_confirm");
                learnt
            }
            Todo::Capture(amount) => {
                let answer = gateway.capture(&charge, amount).await;
                faults::point("pay.after_capture");
                answer.map_or_else(Learnt::from, Learnt::found)
            }
            Todo::Void => {
                let answer = gateway.void(&charge).await;
                faults::point("pay.after_void");
                answer.map_or_else(Learnt::from, Learnt::found)
            }
            Todo::BuyAgain => self.buy_again(payment).await.unwrap_or_else(Learnt::from),
            Todo::Revoke => self.revoke(payment).await.unwrap_or_else(Learnt::from),
            Todo::Refund => self.money_back(gateway, payment, given_back).await?,
            Todo::Nothing => match self.asked(payment).await? {
                Some(learnt) => learnt,
                None => return Ok(None),
            },
        };
        Ok(Some(learnt))
    }

    async fn open(&self, gateway: &Guarded, payment: &Payment, charge: &Charge) -> Learnt {
        match self.gone(payment).await {
            Ok(true) => return Learnt::fact(Fact::Gone),
            Ok(false) => {}
            Err(error) => return error.into(),
        }
        let answer = gateway.open(charge).await;
        faults::point("pay.after_open");
        match answer {
            Ok(reference) => Learnt {
                reference: Some(reference),
                ..Learnt::fact(Fact::Opened)
            },
            Err(Trouble::Refused(why)) => {
                tracing::warn!(payment = %payment.id, why, "a payment cannot be opened");
                Learnt::declined(Decline::Declined)
            }
            Err(trouble) => trouble.into(),
        }
    }

    /// Whether there is nothing to pay for any more: one of the orders has expired, or all of them
    /// were given back.
    async fn gone(&self, payment: &Payment) -> Result<bool, SaleError> {
        let mut held = false;
        for paid in self.payments.orders(payment.id).await? {
            if paid.fate != Fate::Asked {
                continue;
            }
            match self.shop.order(paid.order, None).await {
                Ok(view) if view.order.status == Status::Held => held = true,
                Ok(view) if view.order.status == Status::Expired => return Ok(true),
                Ok(_) | Err(SaleError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(!held)
    }

    /// Confirms the orders: all that were not given back meanwhile, or none if one has expired.
    async fn confirm(&self, payment: &Payment) -> Result<Learnt, SaleError> {
        let mut asked = Vec::new();
        for paid in self.payments.orders(payment.id).await? {
            let order = match paid.fate {
                Fate::Asked | Fate::Confirmed => self.shop.order(paid.order, None).await,
                Fate::Gone | Fate::Replaced => continue,
            };
            match order {
                Ok(view) => asked.push((paid, Some(view.order))),
                Err(SaleError::NotFound) => asked.push((paid, None)),
                Err(error) => return Err(error),
            }
        }
        let is = |order: &Option<Order>, statuses: &[Status]| {
            order.is_some_and(|order| statuses.contains(&order.status))
        };
        let expired = |(_, order): &(PaidOrder, Option<Order>)| is(order, &[Status::Expired]);
        let mut lapsed = asked.iter().any(expired);
        let mut late = None;
        for (paid, order) in &mut asked {
            if let Some(held) = order.filter(|_| !lapsed) {
                *order = self.shop.confirm(&held, payment.buyer.0).await?;
                if is(order, &[Status::Held, Status::Expired]) {
                    lapsed = true;
                    late = Some(paid.order);
                }
            }
        }
        let mut learnt = Learnt::default();
        let mut worth = 0;
        for (paid, order) in asked {
            let confirmed = is(&order, &[Status::Confirmed]);
            if confirmed && lapsed {
                // Another one expired between the two.
                self.shop.cancel(paid.order, None, payment.buyer.0).await?;
            }
            if confirmed && !lapsed {
                worth += paid.amount;
                learnt.fates.push((paid.order, Fate::Confirmed));
            } else if late == Some(paid.order) || !is(&order, &[Status::Held]) {
                learnt.fates.push((paid.order, Fate::Gone));
            }
        }
        learnt.fact = Some(if worth > 0 {
            Fact::Confirmed(worth)
        } else {
            Fact::Gone
        });
        Ok(learnt)
    }

    /// The money came for orders that had expired: tries to hold the same units again. The new
    /// orders' keys come from the old orders, so that it happens once; no buyer's key has a space.
    async fn buy_again(&self, payment: &Payment) -> Result<Learnt, SaleError> {
        if payment.course.again {
            return Ok(Learnt::fact(Fact::NotToBeHad));
        }
        let mut learnt = Learnt::default();
        for paid in self.payments.orders(payment.id).await? {
            let view = self.shop.order(paid.order, None).await?;
            // What the buyer has cancelled is not wanted any more, and what somebody else pays for
            // is not ours.
            let expired = view.order.status == Status::Expired;
            let other = self.payments.of_order(paid.order).await?;
            let ours =
                other.is_none_or(|other| other.id == payment.id || other.course.captured == 0);
            if !expired || !ours {
                return Ok(Learnt::fact(Fact::NotToBeHad));
            }
            let key = format!("again {}", paid.order);
            let bought = match self.shop.facts(view.sale.id).await {
                Ok(sale) => {
                    let (buyer, units) = (payment.buyer, paid.quantity);
                    self.shop.purchase_anyway(sale, buyer, &key, units).await
                }
                Err(error) => Err(error),
            };
            let order = match bought {
                Ok((answer, _)) => match answer.decision {
                    Decision::Accepted(order) | Decision::Replayed(order) => order,
                    Decision::Refused(_) => return Ok(Learnt::fact(Fact::NotToBeHad)),
                },
                Err(SaleError::NotFound) => return Ok(Learnt::fact(Fact::NotToBeHad)),
                Err(error) => return Err(error),
            };
            if order.status != Status::Held || order.total().amount != paid.amount {
                return Ok(Learnt::fact(Fact::NotToBeHad));
            }
            learnt.fates.push((paid.order, Fate::Replaced));
            learnt.bought.push(PaidOrder {
                order: order.id,
                round: order.round,
                fate: Fate::Asked,
                ..paid
            });
        }
        faults::point("pay.after_bought_again");
        learnt.fact = Some(Fact::BoughtAgain);
        Ok(learnt)
    }

    /// Takes confirmed orders back whose money is gone.
    async fn revoke(&self, payment: &Payment) -> Result<Learnt, SaleError> {
        let mut learnt = Learnt::fact(Fact::Revoked);
        for paid in self.payments.orders(payment.id).await? {
            if paid.fate != Fate::Confirmed {
                continue;
            }
            match self.shop.cancel(paid.order, None, payment.buyer.0).await {
                Ok(_) | Err(SaleError::NotFound) => learnt.fates.push((paid.order, Fate::Gone)),
                Err(error) => return Err(error),
            }
        }
        tracing::warn!(payment = %payment.id, "the money of a confirmed order was gone: it is taken back");
        Ok(learnt)
    }

    /// Gives money back: the first refund that is due.
    async fn money_back(
        &self,
        gateway: &Guarded,
        payment: &Payment,
        given_back: Option<i64>,
    ) -> Result<Learnt, SaleError> {
        let refunds = self.payments.refunds(payment.id).await?;
        let due = refunds
            .into_iter()
            .find(|refund| refund.state == RefundState::Due);
        let Some(due) = due else {
            return Ok(Trouble::Refused("no refund is due".to_owned()).into());
        };
        let amount = due.amount;
        let done = Learnt {
            refund: Some(RefundChange::Done(due.id)),
            ..Learnt::fact(Fact::Refunded(amount))
        };
        if faults::bug("refund_forgotten") {
            return Ok(done);
        }
        // It was, and nobody has written it down.
        if given_back.is_some_and(|given| given >= payment.course.refunded + amount) {
            return Ok(done);
        }
        let refund = GiveBack {
            key: format!("stockade-{}-{}", due.id, due.tries),
            amount,
        };
        let answer = gateway.refund(&payment.charge(), &refund).await;
        faults::point("pay.after_refund");
        Ok(match answer {
            Ok(()) => done,
            Err(trouble) => Learnt {
                refund: matches!(trouble, Trouble::Refused(_))
                    .then_some(RefundChange::Tried(due.id)),
                ..trouble.into()
            },
        })
    }

    /// A refund whose units are to go back first.
    async fn asked(&self, payment: &Payment) -> Result<Option<Learnt>, SaleError> {
        let refunds = self.payments.refunds(payment.id).await?;
        let asked = refunds
            .iter()
            .find(|refund| refund.state == RefundState::Asked);
        let Some(asked) = asked else {
            return Ok(None);
        };
        let id = asked.id;
        let order = asked.order.ok_or(SaleError::NotFound)?;
        let paid = self.payments.orders(payment.id).await?;
        // What was given back before it was confirmed was never taken.
        let worth = paid
            .iter()
            .find(|paid| paid.order == order && paid.fate == Fate::Confirmed);
        let gone: i64 = refunds
            .iter()
            .filter(|refund| refund.order == Some(order))
            .map(|refund| refund.amount)
            .sum();
        let left = worth.map_or(0, |paid| paid.amount - gone);
        let left =
            left.min(payment.course.captured - payment.course.refunded - payment.course.refund_due);
        let returned = match self.shop.give_back(order, asked, left).await {
            Ok(returned) => returned,
            // The order cannot give so much back: it has before, or its round is over.
            Err(SaleError::Conflict(_) | SaleError::NotFound) => None,
            Err(error) => return Ok(Some(error.into())),
        };
        faults::point("pay.after_units_back");
        let amount = returned.as_ref().map_or(0, |(_, amount)| *amount).min(left);
        let Some((quantity, _)) = returned.filter(|_| amount > 0) else {
            return Ok(Some(Learnt {
                refund: Some(RefundChange::Refused(id)),
                ..Learnt::default()
            }));
        };
        Ok(Some(Learnt {
            refund: Some(RefundChange::Due {
                id,
                quantity,
                amount,
            }),
            ..Learnt::fact(Fact::RefundDue(amount))
        }))
    }

    /// Writes down what was learnt, unless somebody was faster: `None`.
    async fn write(
        &self,
        mut payment: Payment,
        learnt: Learnt,
    ) -> Result<Option<Payment>, SaleError> {
        let before = payment.course;
        if let Some(fact) = learnt.fact {
            payment.course = before.after(fact);
        }
        if let Some(reference) = learnt.reference {
            payment.reference = Some(reference);
        }
        if let Some(found) = learnt.found {
            if let Seen::Declined(why) = found.seen {
                payment.decline = Some(why);
            }
            payment.action = found.action;
        }
        if payment.course.state != State::RequiresAction {
            payment.action = None;
        }
        let mut refund = learnt.refund;
        let more = payment.course.refund_due - before.refund_due;
        if more > 0 && refund.is_none() {
            refund = Some(RefundChange::New(unasked(&payment, more)));
        }
        let mut due_in = match payment.course.next() {
            Todo::Nothing => None,
            Todo::Wait => Some(pause_of_waiting(&payment)),
            _ => Some(LEASE),
        };
        match learnt.trouble {
            Some(trouble) => {
                payment.troubles = payment.troubles.saturating_add(1);
                if matches!(trouble, Trouble::Refused(_)) {
                    payment.tries = payment.tries.saturating_add(1);
                }
                let mut pause = PAUSE
                    .saturating_mul(1 << payment.troubles.min(7).saturating_sub(1))
                    .min(PAUSE_MAX);
                if let Trouble::Unavailable { after, .. } = &trouble {
                    pause = pause.max(*after);
                }
                let text = trouble.to_string();
                if payment.trouble.as_ref() != Some(&text) {
                    tracing::warn!(payment = %payment.id, gateway = %payment.gateway,
                        state = payment.course.state.as_str(), trouble = text, "a payment has to wait");
                }
                payment.trouble = Some(text);
                due_in = Some(pause);
            }
            None if payment.course != before => {
                payment.troubles = 0;
                payment.trouble = None;
            }
            // The gateway has nothing new to say: later.
            None if due_in.is_some()
                && refund.is_none()
                && !learnt.looked
                && payment.course.next() != Todo::Wait =>
            {
                payment.troubles = payment.troubles.saturating_add(1);
                due_in = Some(PAUSE);
            }
            None => {}
        }
        let asked = due_in.is_none() && refund.is_some();
        Ok(self
            .payments
            .save(Change {
                payment,
                fates: learnt.fates,
                bought: learnt.bought,
                refund,
                // Another refund may have been asked for meanwhile: somebody looks once more.
                due_in: if asked { Some(Duration::ZERO) } else { due_in },
            })
            .await?)
    }
}

impl Shop {
    /// Confirms a held order before its deadline. Gives it as it is then: confirmed, or what became
    /// of it before; `None` when nobody has it.
    async fn confirm(&self, order: &Order, actor: Uuid) -> Result<Option<Order>, SaleError> {
        let engine = self.engine_of(order).await?;
        let (confirmed, _) = engine.confirm(order.round, order.id, actor).await?;
        Ok(match confirmed {
            Confirmed::Done(order) | Confirmed::Already(order) | Confirmed::Late(order) => {
                Some(order)
            }
            // It has left with its round.
            Confirmed::Unknown => self.orders.by_id(order.id).await?,
        })
    }

    /// Gives a held order the time of its hold once more, counted from now; once in its life.
    ///
    /// # Errors
    /// [`SaleError`]. Somebody else's order is not found.
    pub async fn extend_hold(&self, id: OrderId, buyer: BuyerId) -> Result<OrderView, SaleError> {
        let view = self.order(id, Some(buyer)).await?;
        let engine = self.engine(view.sale.partition)?;
        let (extended, _) = engine.extend(view.order.round, id, buyer.0).await?;
        let order = match extended {
            // Whoever asks twice has lost the first answer: the deadline is the same.
            Extended::Done(order) | Extended::Before(order) => order,
            Extended::Already(order) => {
                payable(&order)?;
                return Err(SaleError::HoldExpired(vec![id]));
            }
            Extended::Late(_) => return Err(SaleError::HoldExpired(vec![id])),
            Extended::Unknown => return Err(SaleError::NotFound),
        };
        Ok(OrderView { order, ..view })
    }

    async fn engine_of(&self, order: &Order) -> Result<&Engine, SaleError> {
        let sale = self.directory.by_number(order.round.sale).await?;
        self.engine(sale.ok_or(SaleError::NotFound)?.partition)
    }

    /// Gives units of an order back, once for the refund, and says how many, and what they were
    /// worth: at most `left`. `None` when there was nothing to give back.
    async fn give_back(
        &self,
        order: OrderId,
        refund: &Refund,
        left: i64,
    ) -> Result<Option<(u64, i64)>, SaleError> {
        let actor = refund.actor.unwrap_or_default();
        if refund.cause == Cause::Cancel {
            let order = self.cancel(order, None, actor).await?.order;
            return Ok((order.status == Status::Cancelled).then_some((order.quantity, left)));
        }
        let view = self.order(order, None).await?;
        let engine = self.engine(view.sale.partition)?;
        let release = if refund.units_return {
            Release::Return
        } else {
            Release::Refund
        };
        let operation = Operation {
            id: OperationId(refund.id),
            fingerprint: refund.fingerprint,
        };
        let durability = engine.gives(view.sale.durability).ok();
        let (released, _) = engine
            .release(
                view.order.round,
                order,
                release,
                refund.quantity,
                Some(operation),
                durability,
                actor,
            )
            .await?;
        match released {
            Released::Done(order) | Released::Replayed(order) => {
                let price = order.unit_price.amount.max(1);
                let amount = match refund.quantity.map(i64::try_from) {
                    Some(units) => price.saturating_mul(units.unwrap_or(i64::MAX)).min(left),
                    None => left,
                };
                let units = u64::try_from(amount / price).unwrap_or(0);
                Ok(Some((units.max(1), amount)))
            }
            Released::Already(_)
            | Released::Held(_)
            | Released::TooMany(_)
            | Released::Settled
            | Released::Unknown => Ok(None),
            Released::Mismatch => Err(SaleError::Mismatch),
        }
    }
}

/// What a payment is to be begun for.
struct Due {
    gateway: Name,
    money: Money,
    orders: Vec<PaidOrder>,
}

impl Due {
    /// For held orders, which must all be paid the same way.
    fn of(views: &[&OrderView]) -> Result<Self, SaleError> {
        let unlike = || SaleError::Unlike(views.iter().copied().cloned().collect());
        let first = *views.first().ok_or(SaleError::Conflict(NONE_WAITS))?;
        let (gateway, currency) = (takes_money(first), first.order.unit_price.currency);
        let gateway = gateway.ok_or_else(unlike)?;
        let mut amount: i64 = 0;
        let mut orders = Vec::with_capacity(views.len());
        for view in views {
            let total = view.order.total();
            if takes_money(view) != Some(gateway) || total.currency != currency {
                return Err(unlike());
            }
            amount = amount.saturating_add(total.amount);
            orders.push(PaidOrder {
                order: view.order.id,
                round: view.order.round,
                quantity: view.order.quantity,
                amount: total.amount,
                fate: Fate::Asked,
            });
        }
        // Always in the same order, so that two at a time do not wait for each other.
        orders.sort_by_key(|paid| paid.order);
        Ok(Self {
            gateway,
            money: Money::new(amount, currency).map_err(|_| unlike())?,
            orders,
        })
    }
}

/// Who takes the money of an order, if any is asked for.
fn takes_money(view: &OrderView) -> Option<Name> {
    view.sale.payment.filter(|_| view.order.total().amount > 0)
}

const NONE_WAITS: &str = "No order of this checkout waits for its payment.";
const BUSY: &str = "Another payment of this order is under way, or it is paid.";

/// Whether an order waits for its payment.
fn payable(order: &Order) -> Result<(), SaleError> {
    match order.status {
        Status::Held => Ok(()),
        Status::Expired => Err(SaleError::HoldExpired(vec![order.id])),
        Status::Confirmed => Err(SaleError::Conflict("The order is paid.")),
        _ => Err(SaleError::Conflict("The order was given back.")),
    }
}

/// A refund that nobody has asked for: the order could not be had, or too much was taken.
fn unasked(payment: &Payment, amount: i64) -> Refund {
    let cause = if payment.course.to_capture == 0 {
        Cause::Late
    } else {
        Cause::Surplus
    };
    let what = format!(
        "{} {} {}",
        cause.as_str(),
        payment.id,
        payment.course.captured
    );
    Refund {
        id: OperationId::derive(&what, Uuid::nil(), "").0,
        payment: payment.id,
        order: None,
        cause,
        state: RefundState::Due,
        quantity: None,
        amount,
        reason: None,
        units_return: false,
        actor: None,
        fingerprint: Fingerprint::of(&[cause.as_str().as_bytes()]),
        tries: 0,
    }
}

/// How long to wait for a buyer or a bank: shortly at first, then an eighth of what it has taken.
fn pause_of_waiting(payment: &Payment) -> Duration {
    let age = clock::now() - payment.created_at;
    let age = age.to_std().unwrap_or_default();
    (age / 8).clamp(PAUSE, PAUSE_MAX)
}
