//! Everything that is kept about a person: told to that person, and erased.

use serde_json::Value;
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin};

/// The most rows of each kind that are told: lists have all of them, in pages.
pub const ROWS_MAX: i64 = 10_000;

/// What became of erasing a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Erased {
    /// Nothing is left that says who it was. These sessions ended.
    Done(Vec<Uuid>),
    /// Nobody is known by that id, or not any more.
    Missing,
    /// Orders still wait for their payment.
    Holds,
    /// Money is still on its way, to or fro.
    Owed,
}

/// What is kept about persons, in all tables.
#[derive(Clone, Debug)]
pub struct Personal {
    database: Database,
}

impl Personal {
    /// What is kept in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Everything that is stored about a user but the account itself; `None` for one who was
    /// erased.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn export(&self, user: Uuid) -> Result<Option<Value>, StoreError> {
        self.database
            .run(async move |pool| {
                Ok(sqlx::query_scalar!(
                    r#"SELECT jsonb_build_object(
                        'profile', (
                            SELECT jsonb_build_object('display_name', display_name,
                                       'show_on_leaderboards', show_on_leaderboards)
                            FROM buyer_profiles WHERE buyer = $1),
                        'sessions', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('id', id,
                                       'created_at', instant(created_at),
                                       'last_used_at', instant(last_used_at),
                                       'expires_at', instant(expires_at),
                                       'revoked_at', instant(revoked_at),
                                       'user_agent', user_agent) ORDER BY id), '[]')
                            FROM (SELECT * FROM sessions WHERE user_id = $1 LIMIT $2) AS own),
                        'api_keys', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('id', id, 'name', name,
                                       'scopes', scopes, 'created_at', instant(created_at),
                                       'expires_at', instant(expires_at),
                                       'last_used_at', instant(last_used_at)) ORDER BY id), '[]')
                            FROM (SELECT * FROM api_keys WHERE user_id = $1 LIMIT $2) AS own),
                        'cart', (
                            SELECT jsonb_build_object('lines', lines, 'updated_at', instant(updated_at))
                            FROM carts WHERE buyer_id = $1),
                        'checkouts', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('id', id, 'state', state,
                                       'lines', lines, 'created_at', instant(created_at))
                                       ORDER BY created_at), '[]')
                            FROM (SELECT * FROM checkouts WHERE buyer_id = $1 LIMIT $2) AS own),
                        'orders', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('id', id, 'sale_id', sale_id,
                                       'round', round, 'quantity', quantity,
                                       'unit_price', jsonb_build_object('amount', unit_price,
                                                                        'currency', currency),
                                       'status', status, 'accepted_at', instant(accepted_at),
                                       'updated_at', instant(updated_at)) ORDER BY accepted_at DESC), '[]')
                            FROM (SELECT * FROM orders WHERE buyer_id = $1
                                  ORDER BY accepted_at DESC, id DESC LIMIT $2) AS own),
                        'payments', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('id', id, 'gateway', gateway,
                                       'state', state, 'method', method,
                                       'amount', jsonb_build_object('amount', amount, 'currency', currency),
                                       'captured', captured, 'refunded', refunded,
                                       'created_at', instant(created_at)) ORDER BY created_at DESC), '[]')
                            FROM (SELECT * FROM payments WHERE buyer_id = $1
                                  ORDER BY created_at DESC LIMIT $2) AS own),
                        'waitlist', (
                            SELECT coalesce(jsonb_agg(jsonb_build_object('sale_id', sales.id,
                                       'round', own.round, 'kind', kind, 'units', units,
                                       'at', instant(at)) ORDER BY at DESC), '[]')
                            FROM (SELECT * FROM round_events
                                  WHERE actor = $1 AND kind IN ('join', 'leave')
                                  ORDER BY at DESC LIMIT $2) AS own
                            JOIN sales ON sales.number = own.sale)
                    ) AS "kept!"
                    WHERE NOT EXISTS (SELECT FROM erased_users WHERE id = $1)"#,
                    user,
                    ROWS_MAX
                )
                .fetch_optional(&pool)
                .await?)
            })
            .await
    }

    /// Forgets who a user was. What was bought stays, under an id that points to nobody.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn erase(&self, user: Uuid) -> Result<Erased, StoreError> {
        self.database
            .run(async move |pool| {
                let mut work = begin(&pool).await?;
                // First: whoever else erases the same user waits here, and finds nobody.
                let new = sqlx::query!(
                    "INSERT INTO erased_users (id) VALUES ($1) ON CONFLICT DO NOTHING",
                    user
                )
                .execute(&mut *work)
                .await?;
                let known = sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT FROM users WHERE id = $1)
                           OR EXISTS (SELECT FROM buyer_profiles WHERE buyer = $1)
                           OR EXISTS (SELECT FROM carts WHERE buyer_id = $1) AS "known!""#,
                    user
                )
                .fetch_one(&mut *work)
                .await?;
                if new.rows_affected() == 0 || !known {
                    return Ok(Erased::Missing);
                }
                let open = sqlx::query!(
                    r#"SELECT EXISTS (SELECT FROM orders WHERE buyer_id = $1 AND status = 'held')
                                  AS "held!",
                              EXISTS (SELECT FROM payments WHERE buyer_id = $1 AND due_at IS NOT NULL)
                                  AS "owed!""#,
                    user
                )
                .fetch_one(&mut *work)
                .await?;
                if open.held {
                    return Ok(Erased::Holds);
                }
                if open.owed {
                    return Ok(Erased::Owed);
                }
                sqlx::query!("DELETE FROM buyer_profiles WHERE buyer = $1", user)
                    .execute(&mut *work)
                    .await?;
                sqlx::query!("DELETE FROM carts WHERE buyer_id = $1", user)
                    .execute(&mut *work)
                    .await?;
                let sessions =
                    sqlx::query_scalar!("DELETE FROM sessions WHERE user_id = $1 RETURNING id", user)
                        .fetch_all(&mut *work)
                        .await?;
                // Its keys and tokens go with it.
                sqlx::query!("DELETE FROM users WHERE id = $1", user)
                    .execute(&mut *work)
                    .await?;
                work.commit().await?;
                Ok(Erased::Done(sessions))
            })
            .await
    }
}
