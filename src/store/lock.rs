//! Who may recover a partition: one at a time.

use std::time::Duration;

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::sync::oneshot;

use super::{Database, StoreError};
use crate::domain::id::Partition;

/// What our locks are told apart by from those of anybody else in the database.
const SPACE: i32 = 0x53_74_6f_63;

/// The time between two signs of life; a holder that gives none for five times as long stands
/// still, and PostgreSQL ends its session.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// How long PostgreSQL may take to answer.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The right to recover a partition. Given back when dropped, and when its process dies or stands
/// still. It keeps recoverers from disturbing each other; that none of them can do harm is due to
/// the epoch.
#[derive(Debug)]
pub struct RecoveryLock {
    _held: oneshot::Sender<()>,
}

impl RecoveryLock {
    /// Takes it; `None` while somebody else has it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take(
        database: &Database,
        partition: Partition,
    ) -> Result<Option<Self>, StoreError> {
        let options = PgConnectOptions::clone(&database.pool.connect_options())
            .application_name(&format!("stockade-recovery-{partition}"))
            .options([("idle_session_timeout", "10s")]);
        let taking = async {
            let mut connection = PgConnection::connect_with(&options).await?;
            let taken = sqlx::query_scalar!(
                r#"SELECT pg_try_advisory_lock($1, $2) AS "taken!""#,
                SPACE,
                i32::from(partition.0)
            )
            .fetch_one(&mut connection)
            .await?;
            Ok::<_, sqlx::Error>(taken.then_some(connection))
        };
        let taken = tokio::time::timeout(WAIT_MAX, taking).await;
        let Some(connection) = taken.unwrap_or(Err(sqlx::Error::PoolTimedOut))? else {
            return Ok(None);
        };
        let (held, given_back) = oneshot::channel();
        tokio::spawn(hold(connection, given_back));
        Ok(Some(Self { _held: held }))
    }
}

/// Keeps the session alive until the lock is given back.
async fn hold(mut connection: PgConnection, mut given_back: oneshot::Receiver<()>) {
    loop {
        tokio::select! {
            _ = &mut given_back => break,
            () = tokio::time::sleep(SIGN_OF_LIFE) => {
                if connection.ping().await.is_err() {
                    return;
                }
            }
        }
    }
    // It ends with the session, one way or the other.
    let _ = connection.close().await;
}
