//! Products: what is sold, and the images that show it.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use uuid::Uuid;

use super::{Database, StoreError, audit_log::begin};
use crate::domain::{
    id::ProductId,
    money::{Currency, Money},
};

/// A product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Row", into = "Row")]
pub struct Product {
    /// Its id.
    pub id: ProductId,
    /// What it says about itself.
    pub content: Content,
    /// What it looks like, in the order to be shown; [`IMAGES_MAX`] at most.
    pub images: Vec<Image>,
    /// Goes up with every change, from 1.
    pub version: i64,
    /// When it was added.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

/// Images of one product.
pub const IMAGES_MAX: usize = 8;

/// An image of a product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: Uuid,
    /// Pixels of what was uploaded, upright.
    pub width: u32,
    /// The same.
    pub height: u32,
    /// The sizes that there are, smallest first.
    pub renditions: Vec<Rendition>,
}

/// An image in one size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendition {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// SHA-256 of its bytes, 64 hexadecimal digits.
    pub hash: String,
    /// `image/jpeg` or `image/webp`.
    pub media_type: String,
}

/// Everything about a product that an operator writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// 1 … 200 characters.
    pub name: String,
    /// 0 … 4,000 characters.
    pub description: String,
    /// What the operator calls it elsewhere: 1 … 64 of letters, digits, `.`, `_`, `/` and `-`.
    pub sku: Option<String>,
    /// The price that its sales start from.
    pub price: Money,
}

/// The parts of a product to change; the others stay.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// A new name.
    pub name: Option<String>,
    /// A new description.
    pub description: Option<String>,
    /// A new price.
    pub price: Option<Money>,
    /// Another SKU, or none.
    pub sku: Option<Option<String>>,
    /// Its images in another order: all of them.
    pub images: Option<Vec<Uuid>>,
}

/// What became of adding a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is there now.
    New(Product),
    /// An earlier attempt with the same key added it; as it was then.
    Replayed(Product),
    /// The same key added another product.
    Mismatch,
    /// Another product has the SKU.
    SkuTaken,
}

/// What became of changing a product that had to have a certain version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed<T> {
    /// Done.
    Done(T),
    /// There is none.
    Missing,
    /// It has another version.
    Stale,
    /// Sales refer to it.
    InUse,
    /// Another product has the SKU.
    SkuTaken,
    /// The order of images leaves some out, or has others.
    OtherImages,
}

/// By what a list is sorted; the id decides among equals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// By name, byte by byte.
    Name,
    /// By amount.
    Price,
    /// By age.
    #[default]
    CreatedAt,
}

/// A place in a sorted list: the last row of a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct After {
    /// The sort that the place is in.
    pub sort: Sort,
    /// Largest first.
    pub descending: bool,
    /// That row's name, where it is sorted by name.
    pub name: Option<String>,
    /// That row's amount, where it is sorted by price.
    pub price: Option<i64>,
    /// That row's age, where it is sorted by age.
    pub created_at: Option<DateTime<Utc>>,
    /// That row's id.
    pub id: Uuid,
}

impl After {
    /// The place of `product` in the list sorted like this.
    pub fn product(product: &Product, sort: Sort, descending: bool) -> Self {
        Self {
            sort,
            descending,
            name: (sort == Sort::Name).then(|| product.content.name.clone()),
            price: (sort == Sort::Price).then_some(product.content.price.amount),
            created_at: (sort == Sort::CreatedAt).then_some(product.created_at),
            id: product.id.0,
        }
    }

    /// Whether it is a place in the list sorted like this.
    pub fn stands_in(&self, sort: Sort, descending: bool) -> bool {
        let keyed = match sort {
            Sort::Name => self.name.is_some(),
            Sort::Price => self.price.is_some(),
            Sort::CreatedAt => self.created_at.is_some(),
        };
        keyed && self.sort == sort && self.descending == descending
    }
}

/// Which products to list.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Search {
    /// Only those with all of these words, or words that begin so, in name, description or SKU.
    pub words: Option<String>,
    /// Only this one of the operator's own numbers.
    pub sku: Option<String>,
    /// Only those of this amount or more.
    pub price_min: Option<i64>,
    /// Only those of this amount or less.
    pub price_max: Option<i64>,
    /// Only those priced in this currency.
    pub currency: Option<String>,
    /// Only those that have, or have not, a sale that is open at this instant.
    pub on_sale: Option<(bool, DateTime<Utc>)>,
    /// By what to sort.
    pub sort: Sort,
    /// Largest first.
    pub descending: bool,
    /// Only those behind this place.
    pub after: Option<After>,
    /// So many at most.
    pub limit: i64,
}

/// A row as PostgreSQL and the cache have it.
#[derive(Serialize, Deserialize)]
struct Row {
    id: Uuid,
    name: String,
    description: String,
    sku: Option<String>,
    price_amount: i64,
    price_currency: String,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    images: Option<Json<Vec<Image>>>,
}

impl From<Product> for Row {
    fn from(product: Product) -> Self {
        let Content {
            name,
            description,
            sku,
            price,
        } = product.content;
        Self {
            id: product.id.0,
            name,
            description,
            sku,
            price_amount: price.amount,
            price_currency: price.currency.as_str().to_owned(),
            version: product.version,
            created_at: product.created_at,
            updated_at: product.updated_at,
            images: Some(Json(product.images)),
        }
    }
}

impl TryFrom<Row> for Product {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        Ok(Self {
            id: ProductId(row.id),
            content: Content {
                name: row.name,
                description: row.description,
                sku: row.sku,
                price: money(row.price_amount, &row.price_currency)?,
            },
            images: row.images.map(|images| images.0).unwrap_or_default(),
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

/// The request that made a product, as `requested` keeps it.
#[derive(Debug, Serialize, Deserialize)]
struct Requested {
    name: String,
    description: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sku: Option<String>,
    amount: i64,
    currency: String,
}

impl Requested {
    fn of(content: &Content) -> Self {
        Self {
            name: content.name.clone(),
            description: content.description.clone(),
            sku: content.sku.clone(),
            amount: content.price.amount,
            currency: content.price.currency.as_str().to_owned(),
        }
    }

    fn content(self) -> Result<Content, StoreError> {
        let price = money(self.amount, &self.currency)?;
        Ok(Content {
            name: self.name,
            description: self.description,
            sku: self.sku,
            price,
        })
    }
}

fn money(amount: i64, currency: &str) -> Result<Money, StoreError> {
    Currency::parse(currency)
        .and_then(|currency| Money::new(amount, currency))
        .map_err(|error| StoreError::Unexpected(sqlx::Error::Decode(Box::new(error))))
}

/// Each word quoted for `to_tsquery`, so that nothing in it is an operator, and open at its end.
fn query(words: &str) -> String {
    let quoted = words
        .split_whitespace()
        .map(|word| format!("'{}':*", word.replace('\\', "\\\\").replace('\'', "''")));
    quoted.collect::<Vec<_>>().join(" & ")
}

/// A statement that gives products: `…` + the columns of [`Row`] + `…`.
macro_rules! select {
    ($before:tt, $after:tt $(, $argument:expr)* $(,)?) => { select!(@ $before, ($after) $(, $argument)*) };
    (@ $before:tt, ($($after:tt)+) $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            $before + r#" products.id, products.name, products.description, products.sku,
                price_amount, price_currency, version, created_at, updated_at,
                (SELECT jsonb_agg(jsonb_build_object(
                            'id', image.id, 'width', image.width, 'height', image.height,
                            'renditions', (
                                SELECT jsonb_agg(jsonb_build_object(
                                           'width', rendition.width, 'height', rendition.height,
                                           'hash', encode(rendition.hash, 'hex'),
                                           'media_type', rendition.media_type)
                                       ORDER BY rendition.width)
                                FROM image_renditions AS rendition WHERE rendition.image = image.id))
                        ORDER BY image.place)
                 FROM product_images AS image
                 WHERE image.product = products.id) AS "images: Json<Vec<Image>>" "# + $($after)+
            $(, $argument)*
        )
    };
}

/// One page, for one way to sort: the macro keeps every one of them checked against the schema.
macro_rules! page {
    ($pool:expr, $search:expr, $after:ident, $column:tt, $compare:tt, $direction:tt, $field:ident, $cast:tt) => {{
        let words = $search.words.as_deref().map(query);
        let (key, id) = match &$search.after {
            Some(after) => (after.$field.clone(), Some(after.id)),
            None => (None, None),
        };
        let (on_sale, now) = $search.on_sale.unzip();
        select!(@
            "SELECT",
            ("FROM products
             WHERE ($1::text IS NULL OR to_tsvector('simple', name || ' ' || description || ' ' || coalesce(sku, ''))
                                      @@ to_tsquery('simple', $1))
               AND ($2::uuid IS NULL OR (" + $column + ", id) " + $compare + " ($3::" + $cast + ", $2))
               AND ($5::text IS NULL OR sku = $5)
               AND ($6::bigint IS NULL OR price_amount >= $6)
               AND ($7::bigint IS NULL OR price_amount <= $7)
               AND ($8::text IS NULL OR price_currency = $8)
               AND ($9::boolean IS NULL OR $9 = EXISTS (
                       SELECT FROM sales
                       JOIN rounds ON rounds.sale = sales.number AND rounds.round >= sales.round
                       WHERE sales.product_id = products.id
                         AND rounds.provisioned_at IS NOT NULL
                         AND rounds.intent IN ('live', 'paused')
                         AND rounds.opens_at <= $10
                         AND (rounds.closes_at IS NULL OR rounds.closes_at > $10)))
             ORDER BY " + $column + " " + $direction + ", id " + $direction + "
             LIMIT $4"),
            words,
            id,
            key as _,
            $search.limit,
            $search.sku,
            $search.price_min,
            $search.price_max,
            $search.currency,
            on_sale,
            now
        )
        .fetch_all($pool)
        .await?
    }};
}

/// The table `products`.
#[derive(Clone, Debug)]
pub struct Products {
    database: Database,
}

impl Products {
    /// The products in `database`.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// Adds a product; `keyed` when its id was derived from an idempotency key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add(
        &self,
        id: ProductId,
        content: &Content,
        keyed: bool,
        now: DateTime<Utc>,
    ) -> Result<Added, StoreError> {
        let content = content.clone();
        self.database
            .run(async move |pool| {
                let requested = keyed.then(|| Json(Requested::of(&content)));
                let mut work = begin(&pool).await?;
                let added = select!(
                    "INSERT INTO products (id, name, description, price_amount, price_currency,
                                           requested, created_at, updated_at, sku)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $7, $8)
                     ON CONFLICT (id) DO NOTHING
                     RETURNING",
                    "",
                    id.0,
                    content.name,
                    content.description,
                    content.price.amount,
                    content.price.currency.as_str(),
                    requested as _,
                    now,
                    content.sku,
                )
                .fetch_optional(&mut *work)
                .await;
                let added = match added {
                    Err(error) if sku_taken(&error) => return Ok(Added::SkuTaken),
                    added => added?,
                };
                work.commit().await?;
                if let Some(row) = added {
                    return Ok(Added::New(row.try_into()?));
                }
                let first = sqlx::query!(
                    r#"SELECT created_at, requested AS "requested: Json<Requested>"
                       FROM products WHERE id = $1"#,
                    id.0
                )
                .fetch_one(&pool)
                .await?;
                match first
                    .requested
                    .map(|requested| requested.0.content())
                    .transpose()?
                {
                    Some(then) if then == content => Ok(Added::Replayed(Product {
                        id,
                        content: then,
                        images: Vec::new(),
                        version: 1,
                        created_at: first.created_at,
                        updated_at: first.created_at,
                    })),
                    _ => Ok(Added::Mismatch),
                }
            })
            .await
    }

    /// The product with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: ProductId) -> Result<Option<Product>, StoreError> {
        self.database
            .run(async move |pool| {
                select!("SELECT", "FROM products WHERE id = $1", id.0)
                    .fetch_optional(&pool)
                    .await?
                    .map(Product::try_from)
                    .transpose()
            })
            .await
    }

    /// A page of products.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn search(&self, search: Search) -> Result<Vec<Product>, StoreError> {
        self.database
            .run(async move |pool| {
                let rows = match (search.sort, search.descending) {
                    (Sort::Name, false) => {
                        page!(&pool, search, after, "name", ">", "ASC", name, "text")
                    }
                    (Sort::Name, true) => {
                        page!(&pool, search, after, "name", "<", "DESC", name, "text")
                    }
                    (Sort::Price, false) => page!(
                        &pool,
                        search,
                        after,
                        "price_amount",
                        ">",
                        "ASC",
                        price,
                        "bigint"
                    ),
                    (Sort::Price, true) => page!(
                        &pool,
                        search,
                        after,
                        "price_amount",
                        "<",
                        "DESC",
                        price,
                        "bigint"
                    ),
                    (Sort::CreatedAt, false) => page!(
                        &pool,
                        search,
                        after,
                        "created_at",
                        ">",
                        "ASC",
                        created_at,
                        "timestamptz"
                    ),
                    (Sort::CreatedAt, true) => page!(
                        &pool,
                        search,
                        after,
                        "created_at",
                        "<",
                        "DESC",
                        created_at,
                        "timestamptz"
                    ),
                };
                rows.into_iter().map(Product::try_from).collect()
            })
            .await
    }

    /// Changes the product if it has this version.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn change(
        &self,
        id: ProductId,
        version: i64,
        change: Change,
        now: DateTime<Utc>,
    ) -> Result<Changed<Product>, StoreError> {
        self.database
            .run(async move |pool| {
                let (new_sku, sku) = (change.sku.is_some(), change.sku.flatten());
                let mut work = begin(&pool).await?;
                let done = sqlx::query!(
                    "UPDATE products
                     SET name = coalesce($3, name),
                         description = coalesce($4, description),
                         price_amount = coalesce($5, price_amount),
                         price_currency = coalesce($6, price_currency),
                         sku = CASE WHEN $7 THEN $8 ELSE sku END,
                         version = version + 1,
                         updated_at = $9
                     WHERE id = $1 AND version = $2",
                    id.0,
                    version,
                    change.name,
                    change.description,
                    change.price.map(|price| price.amount),
                    change.price.as_ref().map(|price| price.currency.as_str()),
                    new_sku,
                    sku,
                    now,
                )
                .execute(&mut *work)
                .await;
                match done {
                    Ok(done) if done.rows_affected() == 1 => {}
                    Ok(_) => return why_not(&mut *work, id).await,
                    Err(error) if sku_taken(&error) => return Ok(Changed::SkuTaken),
                    Err(error) => return Err(error.into()),
                }
                if let Some(images) = change.images {
                    let there = sqlx::query_scalar!(
                        "SELECT id FROM product_images WHERE product = $1",
                        id.0
                    )
                    .fetch_all(&mut *work)
                    .await?;
                    let same = there.len() == images.len()
                        && there.iter().collect::<BTreeSet<_>>() == images.iter().collect();
                    if !same {
                        return Ok(Changed::OtherImages);
                    }
                    sqlx::query!(
                        "UPDATE product_images SET place = array_position($2, id) - 1
                         WHERE product = $1",
                        id.0,
                        &images
                    )
                    .execute(&mut *work)
                    .await?;
                }
                let row = select!("SELECT", "FROM products WHERE id = $1", id.0)
                    .fetch_one(&mut *work)
                    .await?;
                work.commit().await?;
                Ok(Changed::Done(row.try_into()?))
            })
            .await
    }

    /// What changes with every change of products and their images, in the same transaction.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn generation(&self) -> Result<Uuid, StoreError> {
        self.database
            .run(async |pool| {
                Ok(sqlx::query_scalar!("SELECT generation FROM catalogue")
                    .fetch_one(&pool)
                    .await?)
            })
            .await
    }

    /// Removes the product if it has this version and no sale refers to it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove(&self, id: ProductId, version: i64) -> Result<Changed<()>, StoreError> {
        self.database
            .run(async move |pool| {
                let mut work = begin(&pool).await?;
                let done = sqlx::query!(
                    "DELETE FROM products WHERE id = $1 AND version = $2",
                    id.0,
                    version
                )
                .execute(&mut *work)
                .await;
                match done {
                    Ok(done) if done.rows_affected() == 1 => {
                        work.commit().await?;
                        Ok(Changed::Done(()))
                    }
                    Ok(_) => why_not(&mut *work, id).await,
                    Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => {
                        Ok(Changed::InUse)
                    }
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }
}

fn sku_taken(error: &sqlx::Error) -> bool {
    let violated = error
        .as_database_error()
        .and_then(|error| error.constraint());
    violated == Some("products_sku")
}

/// Why no row had both the id and the version.
async fn why_not<T>(
    executor: impl sqlx::PgExecutor<'_>,
    id: ProductId,
) -> Result<Changed<T>, StoreError> {
    let exists = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM products WHERE id = $1) AS "exists!""#,
        id.0
    )
    .fetch_one(executor)
    .await?;
    Ok(if exists {
        Changed::Stale
    } else {
        Changed::Missing
    })
}
