//! Payments, what they pay for, what goes back, and the webhooks that have been seen.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin, rounds::money, unreadable};
use crate::domain::{
    id::{BuyerId, Fingerprint, OrderId, PaymentId, RoundId, SaleNumber},
    money::Money,
    payment::{Action, Charge, Course, Decline, Gateway, State},
};

/// How long the names of webhooks are kept: longer than any gateway repeats one.
const EVENTS_KEPT: Duration = Duration::from_hours(30 * 24);

/// A payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payment {
    /// Derived from what is paid for, the buyer and the key.
    pub id: PaymentId,
    /// Who takes the money.
    pub gateway: Gateway,
    /// Who pays.
    pub buyer: BuyerId,
    /// What with: the gateway's token.
    pub method: String,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// What the buyer is asked for.
    pub money: Money,
    /// How far it has come.
    pub course: Course,
    /// The gateway's name of it.
    pub reference: Option<String>,
    /// What the buyer has to do.
    pub action: Option<Action>,
    /// Why the bank said no.
    pub decline: Option<Decline>,
    /// What went wrong last.
    pub trouble: Option<String>,
    /// How often the gateway has definitely not done what it was asked for.
    pub tries: u32,
    /// Troubles in a row.
    pub troubles: u32,
    /// Counts changes.
    pub version: i64,
    /// When it was begun.
    pub created_at: DateTime<Utc>,
    /// When it changed last.
    pub updated_at: DateTime<Utc>,
}

impl Payment {
    /// What a gateway hears of it.
    pub fn charge(&self) -> Charge {
        Charge {
            id: self.id,
            reference: self.reference.clone(),
            money: self.money,
            method: self.method.clone(),
            tries: self.tries,
        }
    }
}

/// A payment to begin.
#[derive(Clone, Debug)]
pub struct NewPayment {
    /// Derived.
    pub id: PaymentId,
    /// Who takes the money.
    pub gateway: Gateway,
    /// Who pays.
    pub buyer: BuyerId,
    /// What with.
    pub method: String,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// What the buyer is asked for: the sum of the orders, above zero.
    pub money: Money,
    /// What is paid for.
    pub orders: Vec<PaidOrder>,
}

/// What became of beginning a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is there, and its maker is the one who works on it.
    New(Payment),
    /// An earlier attempt with the same key began it.
    Known(Payment),
    /// One of the orders is being paid for, or was, by this payment.
    Busy(PaymentId),
}

/// What became of an order that is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// To be confirmed.
    Asked,
    /// Bought.
    Confirmed,
    /// It had expired, or was cancelled.
    Gone,
    /// Its units were bought again as another order.
    Replaced,
}

impl Fate {
    fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Confirmed => "confirmed",
            Self::Gone => "gone",
            Self::Replaced => "replaced",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Asked, Self::Confirmed, Self::Gone, Self::Replaced]
            .into_iter()
            .find(|fate| fate.as_str() == word)
    }
}

/// An order that is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaidOrder {
    /// Which.
    pub order: OrderId,
    /// Of which round.
    pub round: RoundId,
    /// Units.
    pub quantity: u64,
    /// What it is worth, minor units.
    pub amount: i64,
    /// What became of it.
    pub fate: Fate,
}

/// Why money goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An operator wants it.
    Refund,
    /// The order was given back.
    Cancel,
    /// The order had expired when the money came.
    Late,
    /// More was taken than asked for.
    Surplus,
}

impl Cause {
    /// The word that PostgreSQL uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refund => "refund",
            Self::Cancel => "cancel",
            Self::Late => "late",
            Self::Surplus => "surplus",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Refund, Self::Cancel, Self::Late, Self::Surplus]
            .into_iter()
            .find(|cause| cause.as_str() == word)
    }
}

/// How far a refund has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefundState {
    /// The units are to go back first.
    Asked,
    /// The money is to go back.
    Due,
    /// It did.
    Done,
    /// There was nothing to give back.
    Refused,
}

impl RefundState {
    /// The word that API and PostgreSQL use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Due => "due",
            Self::Done => "done",
            Self::Refused => "refused",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Asked, Self::Due, Self::Done, Self::Refused]
            .into_iter()
            .find(|state| state.as_str() == word)
    }
}

/// Money that goes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refund {
    /// Derived from the operator's key, or from payment and cause.
    pub id: Uuid,
    /// Whose money.
    pub payment: PaymentId,
    /// Whose units.
    pub order: Option<OrderId>,
    /// Why.
    pub cause: Cause,
    /// How far it has come.
    pub state: RefundState,
    /// Units; `None` while all that is left is asked for.
    pub quantity: Option<u64>,
    /// Minor units; 0 while it is not known.
    pub amount: i64,
    /// What the operator says.
    pub reason: Option<String>,
    /// Whether the units are for sale again.
    pub units_return: bool,
    /// Who asked.
    pub actor: Option<Uuid>,
    /// What the request asked for.
    pub fingerprint: Fingerprint,
    /// How often the gateway has definitely not done it.
    pub tries: u32,
}

/// What happens to a refund in the same breath as its payment changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefundChange {
    /// It is due, and was not thought of before.
    New(Refund),
    /// The units went back: so many, worth so much.
    Due {
        /// Which.
        id: Uuid,
        /// Units.
        quantity: u64,
        /// Minor units.
        amount: i64,
    },
    /// The money went back.
    Done(Uuid),
    /// There is nothing to give back.
    Refused(Uuid),
    /// The gateway has definitely not done it.
    Tried(Uuid),
}

/// A change of a payment, all of it or none.
#[derive(Clone, Debug)]
pub struct Change {
    /// As it shall be. Its version is the one that was read.
    pub payment: Payment,
    /// What became of its orders.
    pub fates: Vec<(OrderId, Fate)>,
    /// The orders that hold the units now.
    pub bought: Vec<PaidOrder>,
    /// What becomes of a refund.
    pub refund: Option<RefundChange>,
    /// When somebody shall look at it again; `None` if nothing is left to do.
    pub due_in: Option<Duration>,
}

/// A row as PostgreSQL has it.
struct Columns {
    id: Uuid,
    gateway: String,
    state: String,
    buyer_id: Uuid,
    method: String,
    fingerprint: Vec<u8>,
    amount: i64,
    currency: String,
    opened: bool,
    again: bool,
    to_capture: i64,
    captured: i64,
    refunded: i64,
    refund_due: i64,
    reference: Option<String>,
    action: Option<serde_json::Value>,
    decline: Option<String>,
    trouble: Option<String>,
    tries: i32,
    troubles: i32,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

fn fingerprint(bytes: &[u8]) -> Fingerprint {
    // The column has eight bytes.
    Fingerprint(bytes.try_into().unwrap_or_default())
}

impl TryFrom<Columns> for Payment {
    type Error = StoreError;

    fn try_from(row: Columns) -> Result<Self, StoreError> {
        let wrong = |what: &str| unreadable(format!("{what} of payment {}", row.id));
        let action = row.action.map(serde_json::from_value).transpose();
        Ok(Self {
            id: PaymentId(row.id),
            gateway: Gateway::parse(&row.gateway).ok_or_else(|| wrong("gateway"))?,
            buyer: BuyerId(row.buyer_id),
            fingerprint: fingerprint(&row.fingerprint),
            money: money(row.amount, &row.currency)?,
            course: Course {
                state: State::parse(&row.state).ok_or_else(|| wrong("state"))?,
                opened: row.opened,
                again: row.again,
                amount: row.amount,
                to_capture: row.to_capture,
                captured: row.captured,
                refunded: row.refunded,
                refund_due: row.refund_due,
            },
            action: action.map_err(|_| wrong("action"))?,
            decline: row.decline.as_deref().and_then(Decline::parse),
            method: row.method,
            reference: row.reference,
            trouble: row.trouble,
            tries: row.tries.cast_unsigned(),
            troubles: row.troubles.cast_unsigned(),
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

/// Selects payments; the macro keeps each query checked against the schema.
macro_rules! select {
    ($tail:literal, $($argument:expr),* $(,)?) => {
        sqlx::query_as!(
            Columns,
            "SELECT payment.id, payment.gateway, payment.state, payment.buyer_id, payment.method,
                    payment.fingerprint, payment.amount, payment.currency, payment.opened,
                    payment.again, payment.to_capture, payment.captured, payment.refunded,
                    payment.refund_due, payment.reference, payment.action, payment.decline,
                    payment.trouble, payment.tries, payment.troubles, payment.version,
                    payment.created_at, payment.updated_at
             FROM payments AS payment "
            + $tail,
            $($argument),*
        )
    };
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The tables `payments`, `payment_orders`, `refunds` and `gateway_events`.
#[derive(Clone, Debug)]
pub struct Payments {
    database: Database,
}

impl Payments {
    /// Those in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Begins a payment, once for its id. For as long as `lease` nobody else works on it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin(&self, new: NewPayment, lease: Duration) -> Result<Begun, StoreError> {
        self.database
            .run(async move |pool| {
                let known = |pool: PgPool| async move {
                    let row = select!("WHERE payment.id = $1", new.id.0)
                        .fetch_optional(&pool)
                        .await?;
                    row.map(Payment::try_from).transpose()
                };
                if let Some(payment) = known(pool.clone()).await? {
                    return Ok(Begun::Known(payment));
                }
                let mut transaction = pool.begin().await?;
                let inserted = sqlx::query!(
                    "INSERT INTO payments (id, gateway, state, buyer_id, method, fingerprint, amount,
                                           currency, due_at)
                     VALUES ($1, $2, 'created', $3, $4, $5, $6, $7,
                             now() + $8 * interval '1 millisecond')
                     ON CONFLICT (id) DO NOTHING",
                    new.id.0,
                    new.gateway.as_str(),
                    new.buyer.0,
                    new.method,
                    new.fingerprint.0.as_slice(),
                    new.money.amount,
                    new.money.currency.as_str(),
                    milliseconds(lease),
                )
                .execute(&mut *transaction)
                .await?;
                if inserted.rows_affected() == 1 {
                    for order in &new.orders {
                        match insert_order(&mut transaction, new.id, order).await {
                            Ok(()) => {}
                            Err(error)
                                if error
                                    .as_database_error()
                                    .and_then(|error| error.constraint())
                                    == Some("payment_orders_live") =>
                            {
                                transaction.rollback().await?;
                                let busy = sqlx::query_scalar!(
                                    "SELECT payment_id FROM payment_orders
                                     WHERE order_id = $1 AND live",
                                    order.order.0
                                )
                                .fetch_optional(&pool)
                                .await?;
                                let busy = busy.ok_or(StoreError::Unavailable(error))?;
                                return Ok(Begun::Busy(PaymentId(busy)));
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                transaction.commit().await?;
                let payment = known(pool)
                    .await?
                    .ok_or_else(|| unreadable(format!("payment {}", new.id)))?;
                Ok(if inserted.rows_affected() == 1 {
                    Begun::New(payment)
                } else {
                    Begun::Known(payment)
                })
            })
            .await
    }

    /// The payment with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: PaymentId) -> Result<Option<Payment>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = select!("WHERE payment.id = $1", id.0)
                    .fetch_optional(&pool)
                    .await?;
                row.map(Payment::try_from).transpose()
            })
            .await
    }

    /// The payment of an order: the one that may confirm it, or has; else the latest attempt.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of_order(&self, order: OrderId) -> Result<Option<Payment>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = select!(
                    "JOIN payment_orders AS paid ON paid.payment_id = payment.id
                     WHERE paid.order_id = $1
                     ORDER BY paid.live DESC, payment.captured > 0 DESC, payment.created_at DESC
                     LIMIT 1",
                    order.0
                )
                .fetch_optional(&pool)
                .await?;
                row.map(Payment::try_from).transpose()
            })
            .await
    }

    /// What a payment pays for.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn orders(&self, id: PaymentId) -> Result<Vec<PaidOrder>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    "SELECT order_id, sale, round, quantity, amount, fate FROM payment_orders
                     WHERE payment_id = $1 ORDER BY order_id",
                    id.0
                )
                .fetch_all(&pool)
                .await?;
                rows.into_iter()
                    .map(|row| {
                        Ok(PaidOrder {
                            order: OrderId(row.order_id),
                            round: RoundId {
                                sale: SaleNumber(row.sale.cast_unsigned()),
                                round: row.round.cast_unsigned(),
                            },
                            quantity: row.quantity.cast_unsigned(),
                            amount: row.amount,
                            fate: Fate::parse(&row.fate)
                                .ok_or_else(|| unreadable(format!("fate of {}", row.order_id)))?,
                        })
                    })
                    .collect()
            })
            .await
    }

    /// Payments that somebody has to look at, at most `limit`; for as long as `lease` nobody else
    /// gets them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take(&self, limit: i64, lease: Duration) -> Result<Vec<Payment>, StoreError> {
        self.database
            .run(async move |pool| {
                let ids = sqlx::query_scalar!(
                    "UPDATE payments SET due_at = now() + $2 * interval '1 millisecond'
                     WHERE id IN (SELECT id FROM payments WHERE due_at <= now()
                                  ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED)
                     RETURNING id",
                    limit,
                    milliseconds(lease)
                )
                .fetch_all(&pool)
                .await?;
                if ids.is_empty() {
                    return Ok(Vec::new());
                }
                select!("WHERE payment.id = ANY ($1)", &ids)
                    .fetch_all(&pool)
                    .await?
                    .into_iter()
                    .map(Payment::try_from)
                    .collect()
            })
            .await
    }

    /// Writes a change down, if nobody has changed the payment since it was read. Gives the payment
    /// as it is then; `None` when somebody was faster, and nothing was written.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn save(&self, change: Change) -> Result<Option<Payment>, StoreError> {
        self.database
            .run(async move |pool| {
                let Change {
                    payment,
                    fates,
                    bought,
                    refund,
                    due_in,
                } = change;
                let course = payment.course;
                let action = payment.action.as_ref().map(serde_json::to_value).transpose();
                let action = action.map_err(|error| unreadable(error.to_string()))?;
                let mut transaction = pool.begin().await?;
                let saved = sqlx::query!(
                    "UPDATE payments
                     SET state = $3, opened = $4, again = $5, to_capture = $6, captured = $7,
                         refunded = $8, refund_due = $9, reference = $10, action = $11, decline = $12,
                         trouble = $13, tries = $14, troubles = $15, version = version + 1,
                         due_at = now() + $16 * interval '1 millisecond', updated_at = now()
                     WHERE id = $1 AND version = $2",
                    payment.id.0,
                    payment.version,
                    course.state.as_str(),
                    course.opened,
                    course.again,
                    course.to_capture,
                    course.captured,
                    course.refunded,
                    course.refund_due,
                    payment.reference,
                    action,
                    payment.decline.map(Decline::as_str),
                    payment.trouble,
                    payment.tries.cast_signed(),
                    payment.troubles.cast_signed(),
                    due_in.map(milliseconds),
                )
                .execute(&mut *transaction)
                .await?;
                if saved.rows_affected() == 0 {
                    transaction.rollback().await?;
                    return Ok(None);
                }
                for (order, fate) in fates {
                    sqlx::query!(
                        "UPDATE payment_orders SET fate = $3 WHERE payment_id = $1 AND order_id = $2",
                        payment.id.0,
                        order.0,
                        fate.as_str()
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                for order in &bought {
                    insert_order(&mut transaction, payment.id, order).await?;
                }
                sqlx::query!(
                    "UPDATE payment_orders SET live = $2 AND fate IN ('asked', 'confirmed')
                     WHERE payment_id = $1 AND live <> ($2 AND fate IN ('asked', 'confirmed'))",
                    payment.id.0,
                    course.state.is_live()
                )
                .execute(&mut *transaction)
                .await?;
                if let Some(refund) = refund {
                    change_refund(&mut transaction, refund).await?;
                }
                transaction.commit().await?;
                Ok(Some(Payment {
                    version: payment.version + 1,
                    ..payment
                }))
            })
            .await
    }

    /// Notes that a gateway has told of an event; `false` if it had before. Its payment is due then.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note(
        &self,
        gateway: Gateway,
        event: String,
        kind: String,
        reference: Option<String>,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                let noted = sqlx::query!(
                    "INSERT INTO gateway_events (gateway, event, kind, reference, payment_id)
                     VALUES ($1, $2, $3, $4,
                             (SELECT id FROM payments WHERE gateway = $1 AND reference = $4))
                     ON CONFLICT DO NOTHING",
                    gateway.as_str(),
                    event,
                    kind,
                    reference
                )
                .execute(&mut *transaction)
                .await?;
                let new = noted.rows_affected() == 1;
                if new {
                    // Also one that was over: the gateway may know better.
                    sqlx::query!(
                        "UPDATE payments SET due_at = least(due_at, now())
                         WHERE gateway = $1 AND reference = $2",
                        gateway.as_str(),
                        reference
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                Ok(new)
            })
            .await
    }

    /// Lets go of the names of old webhooks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_events(&self) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "DELETE FROM gateway_events
                     WHERE received_at < now() - $1 * interval '1 millisecond'",
                    milliseconds(EVENTS_KEPT)
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// Makes sure that somebody looks at the payment now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn hurry(&self, id: PaymentId) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!("UPDATE payments SET due_at = now() WHERE id = $1", id.0)
                    .execute(&pool)
                    .await?;
                Ok(())
            })
            .await
    }

    /// Notes that money shall go back once the units did. Gives the refund as it stands: an earlier
    /// attempt may have noted it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ask_refund(&self, refund: Refund, lease: Duration) -> Result<Refund, StoreError> {
        self.database
            .run(async move |pool| {
                let mut transaction = begin(&pool).await?;
                let new = insert_refund(&mut transaction, &refund).await?;
                if new {
                    sqlx::query!(
                        "UPDATE payments
                         SET due_at = least(due_at, now() + $2 * interval '1 millisecond')
                         WHERE id = $1",
                        refund.payment.0,
                        milliseconds(lease)
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                let stored = refunds(&pool, refund.payment).await?;
                let stored = stored.into_iter().find(|stored| stored.id == refund.id);
                stored.ok_or_else(|| unreadable(format!("refund {}", refund.id)))
            })
            .await
    }

    /// What goes back of a payment, the first first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn refunds(&self, id: PaymentId) -> Result<Vec<Refund>, StoreError> {
        self.database
            .run(async move |pool| refunds(&pool, id).await)
            .await
    }

    /// Whether a payment of this round may still confirm one of its orders, or take one back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn pending(&self, round: RoundId) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_scalar!(
                    r#"SELECT EXISTS (
                           SELECT FROM payment_orders AS paid
                           JOIN payments AS payment ON payment.id = paid.payment_id
                           WHERE paid.sale = $1 AND paid.round = $2
                             AND (payment.state NOT IN ('captured', 'voided', 'declined', 'refunded')
                                  OR EXISTS (SELECT FROM refunds AS refund
                                             WHERE refund.payment_id = payment.id
                                               AND refund.state = 'asked'))) AS "pending!""#,
                    round.sale.0.cast_signed(),
                    round.round.cast_signed()
                )
                .fetch_one(&pool)
                .await?)
            })
            .await
    }
}

async fn insert_order(
    connection: &mut PgConnection,
    payment: PaymentId,
    order: &PaidOrder,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO payment_orders (payment_id, order_id, sale, round, quantity, amount, fate)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
        payment.0,
        order.order.0,
        order.round.sale.0.cast_signed(),
        order.round.round.cast_signed(),
        order.quantity.cast_signed(),
        order.amount,
        order.fate.as_str()
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn insert_refund(connection: &mut PgConnection, refund: &Refund) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "INSERT INTO refunds (id, payment_id, order_id, cause, state, quantity, whole, amount, reason,
                              units_return, actor, fingerprint)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
         ON CONFLICT (id) DO NOTHING",
        refund.id,
        refund.payment.0,
        refund.order.map(|order| order.0),
        refund.cause.as_str(),
        refund.state.as_str(),
        refund.quantity.map(u64::cast_signed),
        refund.quantity.is_none(),
        refund.amount,
        refund.reason,
        refund.units_return,
        refund.actor,
        refund.fingerprint.0.as_slice()
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

async fn change_refund(
    connection: &mut PgConnection,
    change: RefundChange,
) -> Result<(), StoreError> {
    match change {
        RefundChange::New(refund) => {
            insert_refund(connection, &refund).await?;
        }
        RefundChange::Due {
            id,
            quantity,
            amount,
        } => {
            sqlx::query!(
                "UPDATE refunds SET state = 'due', quantity = $2, amount = $3
                 WHERE id = $1 AND state = 'asked'",
                id,
                quantity.cast_signed(),
                amount
            )
            .execute(connection)
            .await?;
        }
        RefundChange::Done(id) => {
            sqlx::query!(
                "UPDATE refunds SET state = 'done', done_at = now() WHERE id = $1 AND state = 'due'",
                id
            )
            .execute(connection)
            .await?;
        }
        RefundChange::Refused(id) => {
            sqlx::query!(
                "UPDATE refunds SET state = 'refused', done_at = now()
                 WHERE id = $1 AND state = 'asked'",
                id
            )
            .execute(connection)
            .await?;
        }
        RefundChange::Tried(id) => {
            sqlx::query!("UPDATE refunds SET tries = tries + 1 WHERE id = $1", id)
                .execute(connection)
                .await?;
        }
    }
    Ok(())
}

async fn refunds(pool: &PgPool, payment: PaymentId) -> Result<Vec<Refund>, StoreError> {
    let rows = sqlx::query!(
        "SELECT id, order_id, cause, state, quantity, amount, reason, units_return, actor, fingerprint,
                tries
         FROM refunds WHERE payment_id = $1 ORDER BY created_at, id",
        payment.0
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let wrong = |what: &str| unreadable(format!("{what} of refund {}", row.id));
            Ok(Refund {
                id: row.id,
                payment,
                order: row.order_id.map(OrderId),
                cause: Cause::parse(&row.cause).ok_or_else(|| wrong("cause"))?,
                state: RefundState::parse(&row.state).ok_or_else(|| wrong("state"))?,
                quantity: row.quantity.map(i64::cast_unsigned),
                amount: row.amount,
                reason: row.reason,
                units_return: row.units_return,
                actor: row.actor,
                fingerprint: fingerprint(&row.fingerprint),
                tries: row.tries.cast_unsigned(),
            })
        })
        .collect()
}
