//! What buyers want to be called in public.

use uuid::Uuid;

use super::{Database, StoreError};
use crate::domain::id::BuyerId;

/// What a buyer is called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// 1 … 40 characters.
    pub display_name: Option<String>,
    /// Whether leaderboards show it.
    pub show_on_leaderboards: bool,
}

/// The table `buyer_profiles`.
#[derive(Clone, Debug)]
pub struct Profiles {
    database: Database,
}

impl Profiles {
    /// The profiles in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// What this buyer has said; nothing is the default.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn of(&self, buyer: BuyerId) -> Result<Profile, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query_as!(
                    Profile,
                    "SELECT display_name, show_on_leaderboards FROM buyer_profiles
                     WHERE buyer = $1",
                    buyer.0
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.unwrap_or_default())
            })
            .await
    }

    /// Changes what is `Some`. `None` when that would show a name that is not there; nothing is
    /// changed then.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(
        &self,
        buyer: BuyerId,
        display_name: Option<String>,
        show: Option<bool>,
    ) -> Result<Option<Profile>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut work = pool.begin().await?;
                // Apart from the change: a constraint would judge the row that is not inserted.
                sqlx::query!(
                    "INSERT INTO buyer_profiles (buyer) VALUES ($1) ON CONFLICT (buyer) DO NOTHING",
                    buyer.0
                )
                .execute(&mut *work)
                .await?;
                let changed = sqlx::query_as!(
                    Profile,
                    "UPDATE buyer_profiles
                     SET display_name = coalesce($2, display_name),
                         show_on_leaderboards = coalesce($3, show_on_leaderboards)
                     WHERE buyer = $1
                     RETURNING display_name, show_on_leaderboards",
                    buyer.0,
                    display_name,
                    show
                )
                .fetch_one(&mut *work)
                .await;
                match changed {
                    Ok(profile) => {
                        work.commit().await?;
                        Ok(Some(profile))
                    }
                    Err(sqlx::Error::Database(error)) if error.is_check_violation() => Ok(None),
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }

    /// The names of those of `buyers` who want them to be shown.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shown(&self, buyers: Vec<BuyerId>) -> Result<Vec<(BuyerId, String)>, StoreError> {
        let buyers: Vec<Uuid> = buyers.into_iter().map(|buyer| buyer.0).collect();
        self.database
            .run(async move |pool| {
                let rows = sqlx::query!(
                    r#"SELECT buyer, display_name AS "name!" FROM buyer_profiles
                       WHERE buyer = ANY ($1) AND show_on_leaderboards"#,
                    &buyers
                )
                .fetch_all(&pool)
                .await?;
                let named = rows.into_iter().map(|row| (BuyerId(row.buyer), row.name));
                Ok(named.collect())
            })
            .await
    }
}
