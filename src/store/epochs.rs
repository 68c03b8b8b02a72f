//! What was lost when an epoch began, as recovery has noted it.

use super::{Database, StoreError};
use crate::domain::id::{Epoch, Partition};

/// The table `epochs`, as redemption reads it.
#[derive(Clone, Debug)]
pub struct Epochs {
    database: Database,
}

impl Epochs {
    /// The epochs in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// The last journal entry of `epoch` that every later epoch had when it began: what `epoch`
    /// accepted behind it was lost. `None` while no later epoch has begun.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn recovered_end(
        &self,
        partition: Partition,
        epoch: Epoch,
    ) -> Result<Option<u64>, StoreError> {
        self.database
            .run(async move |pool| {
                let end = sqlx::query_scalar!(
                    "SELECT min(recovered_to) FROM epochs WHERE partition = $1 AND epoch > $2",
                    partition.0.cast_signed(),
                    epoch.0.cast_signed()
                )
                .fetch_one(&pool)
                .await?;
                Ok(end.map(i64::cast_unsigned))
            })
            .await
    }
}
