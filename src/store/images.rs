//! Images of products, in all sizes that there are of each.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin, products::IMAGES_MAX};
use crate::domain::id::ProductId;

/// An image to add, in all its sizes.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its id.
    pub id: Uuid,
    /// SHA-256 of the upload.
    pub source: [u8; 32],
    /// Pixels of the upload, upright.
    pub width: u32,
    /// The same.
    pub height: u32,
    /// The sizes, each of another width.
    pub renditions: Vec<NewRendition>,
}

/// An image in one size.
#[derive(Clone, Debug)]
pub struct NewRendition {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// SHA-256 of `bytes`.
    pub hash: [u8; 32],
    /// `image/jpeg` or `image/webp`.
    pub media_type: &'static str,
    /// The file.
    pub bytes: Vec<u8>,
}

/// What became of adding an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAdded {
    /// It is the last of the product's images now.
    New(Uuid),
    /// The product has the same upload already, under this id.
    There(Uuid),
    /// The product has as many as it may have.
    Full,
    /// There is no such product.
    Missing,
}

/// What is served under the address of a rendition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// `image/jpeg` or `image/webp`.
    pub media_type: String,
    /// The bytes.
    pub bytes: Bytes,
}

/// The tables `product_images` and `image_renditions`.
#[derive(Clone, Debug)]
pub struct Images {
    database: Database,
}

impl Images {
    /// The images in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Adds an image behind the product's others.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(
        &self,
        product: ProductId,
        image: NewImage,
        now: DateTime<Utc>,
    ) -> Result<ImageAdded, StoreError> {
        self.database
            .run(async move |pool| {
                let mut work = begin(&pool).await?;
                // Whoever adds to the same product waits here, so that the count holds.
                let known = sqlx::query_scalar!(
                    "SELECT id FROM products WHERE id = $1 FOR UPDATE",
                    product.0
                )
                .fetch_optional(&mut *work)
                .await?;
                if known.is_none() {
                    return Ok(ImageAdded::Missing);
                }
                let there = sqlx::query!(
                    "SELECT id, place, source FROM product_images WHERE product = $1",
                    product.0
                )
                .fetch_all(&mut *work)
                .await?;
                if let Some(same) = there.iter().find(|row| row.source == image.source) {
                    return Ok(ImageAdded::There(same.id));
                }
                // Removing one leaves a gap, and the last place may be taken.
                let mut places: Vec<_> = there.iter().map(|row| (row.place, row.id)).collect();
                places.sort_unstable();
                if places.len() >= IMAGES_MAX {
                    return Ok(ImageAdded::Full);
                }
                let ids: Vec<Uuid> = places.into_iter().map(|(_, id)| id).collect();
                sqlx::query!(
                    "UPDATE product_images SET place = array_position($2, id) - 1
                     WHERE product = $1",
                    product.0,
                    &ids
                )
                .execute(&mut *work)
                .await?;
                sqlx::query!(
                    "INSERT INTO product_images (id, product, place, width, height, source, added_at)
                     VALUES ($1, $2, $3, $4, $5, $6, $7)",
                    image.id,
                    product.0,
                    i16::try_from(ids.len()).unwrap_or(i16::MAX),
                    image.width.cast_signed(),
                    image.height.cast_signed(),
                    &image.source[..],
                    now
                )
                .execute(&mut *work)
                .await?;
                for rendition in &image.renditions {
                    sqlx::query!(
                        "INSERT INTO image_renditions (image, width, height, hash, media_type, bytes)
                         VALUES ($1, $2, $3, $4, $5, $6)",
                        image.id,
                        rendition.width.cast_signed(),
                        rendition.height.cast_signed(),
                        &rendition.hash[..],
                        rendition.media_type,
                        rendition.bytes
                    )
                    .execute(&mut *work)
                    .await?;
                }
                touch(&mut work, product, now).await?;
                work.commit().await?;
                Ok(ImageAdded::New(image.id))
            })
            .await
    }

    /// Removes an image of a product; `false` when there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove(
        &self,
        product: ProductId,
        image: Uuid,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.database
            .run(async move |pool| {
                let mut work = begin(&pool).await?;
                // The product first, as everybody else who changes its images.
                touch(&mut work, product, now).await?;
                let done = sqlx::query!(
                    "DELETE FROM product_images WHERE id = $1 AND product = $2",
                    image,
                    product.0
                )
                .execute(&mut *work)
                .await?;
                if done.rows_affected() == 0 {
                    return Ok(false);
                }
                work.commit().await?;
                Ok(true)
            })
            .await
    }

    /// The rendition with this SHA-256.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file(&self, hash: [u8; 32]) -> Result<Option<File>, StoreError> {
        self.database
            .run(async move |pool| {
                let row = sqlx::query!(
                    "SELECT media_type, bytes FROM image_renditions WHERE hash = $1 LIMIT 1",
                    &hash[..]
                )
                .fetch_optional(&pool)
                .await?;
                Ok(row.map(|row| File {
                    media_type: row.media_type,
                    bytes: row.bytes.into(),
                }))
            })
            .await
    }
}

/// The product has another version: its images are part of it.
async fn touch(
    work: &mut sqlx::PgConnection,
    product: ProductId,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "UPDATE products SET version = version + 1, updated_at = $2 WHERE id = $1",
        product.0,
        now
    )
    .execute(work)
    .await?;
    Ok(())
}
