//! Which secret each number of a receipt key stands for.

use super::{Database, StoreError};

/// Notes keys, each a number and the fingerprint of its secret, and gives the numbers that stood for
/// another secret before.
///
/// # Errors
/// [`StoreError`].
pub async fn claim(database: &Database, keys: &[(u8, [u8; 8])]) -> Result<Vec<u8>, StoreError> {
    let keys = keys.to_vec();
    database
        .run(async move |pool| {
            let numbers: Vec<i16> = keys.iter().map(|(number, _)| (*number).into()).collect();
            let prints: Vec<Vec<u8>> = keys.iter().map(|(_, print)| print.to_vec()).collect();
            sqlx::query!(
                "INSERT INTO receipt_keys (number, fingerprint)
                 SELECT * FROM UNNEST ($1::smallint[], $2::bytea[])
                 ON CONFLICT (number) DO NOTHING",
                &numbers,
                &prints
            )
            .execute(&pool)
            .await?;
            let known = sqlx::query!(
                "SELECT number, fingerprint FROM receipt_keys WHERE number = ANY ($1)",
                &numbers
            )
            .fetch_all(&pool)
            .await?;
            let stood_for_another = |(number, print): &(u8, [u8; 8])| {
                known.iter().any(|known| {
                    known.number == i16::from(*number) && known.fingerprint[..] != print[..]
                })
            };
            let others = keys.iter().filter(|key| stood_for_another(key));
            Ok(others.map(|(number, _)| *number).collect())
        })
        .await
}
