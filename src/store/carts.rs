//! Carts and checkouts.

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::{Database, StoreError, unreadable};
use crate::domain::{
    cart::{Line, OrderedLine},
    id::BuyerId,
};

/// What a buyer means to buy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cart {
    /// Each sale once.
    pub lines: Vec<Line>,
    /// Counts changes; 0 for a cart that nobody has ever filled.
    pub version: i64,
}

/// How far a checkout has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckoutState {
    /// Orders may be there.
    Pending,
    /// All orders are there.
    Accepted,
    /// Some orders were there and were withdrawn; why, as it was told.
    Failed(serde_json::Value),
}

/// An attempt to buy a cart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkout {
    /// Derived from buyer and key.
    pub id: Uuid,
    /// Whose.
    pub buyer: BuyerId,
    /// What.
    pub lines: Vec<OrderedLine>,
    /// How far.
    pub state: CheckoutState,
    /// The cart that it buys.
    pub cart_version: i64,
}

/// Whose turn it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The caller's, until the lease ends.
    Mine(Checkout),
    /// It is over.
    Over(Checkout),
    /// Somebody else is at work.
    Busy,
}

/// The tables `carts` and `checkouts`.
#[derive(Clone, Debug)]
pub struct Carts {
    database: Database,
}

struct Columns {
    id: Uuid,
    buyer_id: Uuid,
    state: String,
    lines: serde_json::Value,
    reasons: Option<serde_json::Value>,
    cart_version: i64,
}

impl TryFrom<Columns> for Checkout {
    type Error = StoreError;

    fn try_from(row: Columns) -> Result<Self, StoreError> {
        Ok(Self {
            id: row.id,
            buyer: BuyerId(row.buyer_id),
            lines: read(row.lines)?,
            state: match (row.state.as_str(), row.reasons) {
                ("pending", _) => CheckoutState::Pending,
                ("accepted", _) => CheckoutState::Accepted,
                ("failed", Some(reasons)) => CheckoutState::Failed(reasons),
                _ => return Err(unreadable(format!("state of checkout {}", row.id))),
            },
            cart_version: row.cart_version,
        })
    }
}

fn read<T: serde::de::DeserializeOwned>(lines: serde_json::Value) -> Result<T, StoreError> {
    serde_json::from_value(lines).map_err(|error| unreadable(format!("lines: {error}")))
}

fn write<T: serde::Serialize>(lines: &T) -> Result<serde_json::Value, StoreError> {
    serde_json::to_value(lines).map_err(|error| unreadable(format!("lines: {error}")))
}

impl Carts {
    /// The carts in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// A buyer's cart.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get(&self, buyer: BuyerId) -> Result<Cart, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    "SELECT lines, version FROM carts WHERE buyer_id = $1",
                    buyer.0
                )
                .fetch_optional(&pool)
                .await?;
                row.map_or(Ok(Cart::default()), |row| {
                    Ok(Cart {
                        lines: read(row.lines)?,
                        version: row.version,
                    })
                })
            })
            .await
    }

    /// Puts other lines into a buyer's cart, if it has this version; `None` takes any. Gives the
    /// cart; `None` when it has another version.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put(
        &self,
        buyer: BuyerId,
        lines: Vec<Line>,
        version: Option<i64>,
    ) -> Result<Option<Cart>, StoreError> {
        let stored = write(&lines)?;
        self.database
            .run(async move |pool| {
                let version = sqlx::query_scalar!(
                    "INSERT INTO carts (buyer_id, lines) SELECT $1, $2
                     WHERE coalesce($3::bigint, 0) = 0
                        OR EXISTS (SELECT FROM carts WHERE buyer_id = $1 AND version = $3)
                     ON CONFLICT (buyer_id) DO UPDATE
                     SET lines = $2, version = carts.version + 1, updated_at = now()
                     WHERE $3::bigint IS NULL OR carts.version = $3
                     RETURNING version",
                    buyer.0,
                    stored,
                    version
                )
                .fetch_optional(&pool)
                .await?;
                Ok(version.map(|version| Cart { lines, version }))
            })
            .await
    }

    /// The checkout with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn checkout(&self, id: Uuid) -> Result<Option<Checkout>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query_as!(
                    Columns,
                    "SELECT id, buyer_id, state, lines, reasons, cart_version
                     FROM checkouts WHERE id = $1",
                    id
                )
                .fetch_optional(&pool)
                .await?;
                row.map(Checkout::try_from).transpose()
            })
            .await
    }

    /// Makes a checkout, or takes up the one that is there, for as long as `lease`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take(
        &self,
        checkout: Checkout,
        now: DateTime<Utc>,
        lease: TimeDelta,
    ) -> Result<Taken, StoreError> {
        let lines = write(&checkout.lines)?;
        self.database
            .run(async move |pool| {
                let taken = sqlx::query_as!(
                    Columns,
                    "INSERT INTO checkouts (id, buyer_id, lines, cart_version, leased_until)
                     VALUES ($1, $2, $3, $4, $6)
                     ON CONFLICT (id) DO UPDATE SET leased_until = $6, updated_at = now()
                     WHERE checkouts.state = 'pending' AND checkouts.leased_until <= $5
                     RETURNING id, buyer_id, state, lines, reasons, cart_version",
                    checkout.id,
                    checkout.buyer.0,
                    lines,
                    checkout.cart_version,
                    now,
                    now + lease
                )
                .fetch_optional(&pool)
                .await?;
                if let Some(row) = taken {
                    return Ok(Taken::Mine(row.try_into()?));
                }
                let row = sqlx::query_as!(
                    Columns,
                    "SELECT id, buyer_id, state, lines, reasons, cart_version
                     FROM checkouts WHERE id = $1",
                    checkout.id
                )
                .fetch_optional(&pool)
                .await?;
                Ok(match row.map(Checkout::try_from).transpose()? {
                    Some(over) if over.state != CheckoutState::Pending => Taken::Over(over),
                    Some(_) | None => Taken::Busy,
                })
            })
            .await
    }

    /// Ends a checkout; one that was accepted empties the cart that it bought, if that is still the
    /// same.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end(&self, checkout: &Checkout, state: CheckoutState) -> Result<(), StoreError> {
        let (id, buyer, version) = (checkout.id, checkout.buyer.0, checkout.cart_version);
        self.database
            .run(async move |pool| {
                let mut transaction = pool.begin().await?;
                let (word, reasons) = match state {
                    CheckoutState::Pending => ("pending", None),
                    CheckoutState::Accepted => ("accepted", None),
                    CheckoutState::Failed(reasons) => ("failed", Some(reasons)),
                };
                let ended = sqlx::query!(
                    "UPDATE checkouts SET state = $2, reasons = $3, updated_at = now()
                     WHERE id = $1 AND state = 'pending'",
                    id,
                    word,
                    reasons
                )
                .execute(&mut *transaction)
                .await?;
                if ended.rows_affected() == 1 && word == "accepted" {
                    sqlx::query!(
                        "UPDATE carts SET lines = '[]', version = version + 1, updated_at = now()
                         WHERE buyer_id = $1 AND version = $2",
                        buyer,
                        version
                    )
                    .execute(&mut *transaction)
                    .await?;
                }
                transaction.commit().await?;
                Ok(())
            })
            .await
    }

    /// Forgets a checkout of which nothing was ever accepted: its key may try again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget(&self, id: Uuid) -> Result<(), StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query!(
                    "DELETE FROM checkouts WHERE id = $1 AND state = 'pending'",
                    id
                )
                .execute(&pool)
                .await?;
                Ok(())
            })
            .await
    }

    /// Takes up checkouts that nobody works on any more, at most `limit`, for as long as `lease`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn abandoned(
        &self,
        now: DateTime<Utc>,
        lease: TimeDelta,
        limit: i64,
    ) -> Result<Vec<Checkout>, StoreError> {
        self.database
            .run(async move |pool| {
                sqlx::query_as!(
                    Columns,
                    "UPDATE checkouts SET leased_until = $2, updated_at = now()
                     WHERE id IN (SELECT id FROM checkouts
                                  WHERE state = 'pending' AND leased_until <= $1
                                  ORDER BY leased_until LIMIT $3
                                  FOR UPDATE SKIP LOCKED)
                     RETURNING id, buyer_id, state, lines, reasons, cart_version",
                    now,
                    now + lease,
                    limit
                )
                .fetch_all(&pool)
                .await?
                .into_iter()
                .map(Checkout::try_from)
                .collect()
            })
            .await
    }
}
