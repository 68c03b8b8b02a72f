//! Products: what is sold.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Database, StoreError};
use crate::domain::{
    id::ProductId,
    money::{Currency, Money},
};

/// A product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// Its id.
    pub id: ProductId,
    /// What it says about itself.
    pub content: Content,
    /// Goes up with every change, from 1.
    pub version: i64,
    /// When it was added.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

/// Everything about a product that an operator writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// 1 … 200 characters.
    pub name: String,
    /// 0 … 4,000 characters.
    pub description: String,
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
#[derive(Clone, Debug)]
pub struct Search {
    /// Only those whose name or description contains this, in either case.
    pub contains: Option<String>,
    /// By what to sort.
    pub sort: Sort,
    /// Largest first.
    pub descending: bool,
    /// Only those behind this place.
    pub after: Option<After>,
    /// So many at most.
    pub limit: i64,
}

/// A row as PostgreSQL has it.
struct Row {
    id: Uuid,
    name: String,
    description: String,
    price_amount: i64,
    price_currency: String,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<Row> for Product {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        Ok(Self {
            id: ProductId(row.id),
            content: Content {
                name: row.name,
                description: row.description,
                price: money(row.price_amount, &row.price_currency)?,
            },
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
    amount: i64,
    currency: String,
}

impl Requested {
    fn of(content: &Content) -> Self {
        Self {
            name: content.name.clone(),
            description: content.description.clone(),
            amount: content.price.amount,
            currency: content.price.currency.as_str().to_owned(),
        }
    }

    fn content(self) -> Result<Content, StoreError> {
        let price = money(self.amount, &self.currency)?;
        Ok(Content {
            name: self.name,
            description: self.description,
            price,
        })
    }
}

fn money(amount: i64, currency: &str) -> Result<Money, StoreError> {
    Currency::parse(currency)
        .and_then(|currency| Money::new(amount, currency))
        .map_err(|error| StoreError::Unexpected(sqlx::Error::Decode(Box::new(error))))
}

/// `%…%` with the characters that mean something to LIKE taken literally.
fn like(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() + 2);
    pattern.push('%');
    for character in text.chars() {
        if matches!(character, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('%');
    pattern
}

/// One page, for one way to sort: the macro keeps every one of them checked against the schema.
macro_rules! page {
    ($pool:expr, $search:expr, $after:ident, $column:tt, $compare:tt, $direction:tt, $field:ident, $cast:tt) => {{
        let pattern = $search.contains.as_deref().map(like);
        let (key, id) = match &$search.after {
            Some(after) => (after.$field.clone(), Some(after.id)),
            None => (None, None),
        };
        sqlx::query_as!(
            Row,
            "SELECT id, name, description, price_amount, price_currency, version, created_at, updated_at
             FROM products
             WHERE ($1::text IS NULL OR name ILIKE $1 OR description ILIKE $1)
               AND ($2::uuid IS NULL OR (" + $column + ", id) " + $compare + " ($3::" + $cast + ", $2))
             ORDER BY " + $column + " " + $direction + ", id " + $direction + "
             LIMIT $4",
            pattern,
            id,
            key as _,
            $search.limit,
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
                let requested = keyed.then(|| sqlx::types::Json(Requested::of(&content)));
                let added = sqlx::query_as!(
                    Row,
                    "INSERT INTO products (id, name, description, price_amount, price_currency,
                                           requested, created_at, updated_at)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $7)
                     ON CONFLICT (id) DO NOTHING
                     RETURNING id, name, description, price_amount, price_currency, version,
                               created_at, updated_at",
                    id.0,
                    content.name,
                    content.description,
                    content.price.amount,
                    content.price.currency.as_str(),
                    requested as _,
                    now,
                )
                .fetch_optional(&pool)
                .await?;
                if let Some(row) = added {
                    return Ok(Added::New(row.try_into()?));
                }
                let first = sqlx::query!(
                    r#"SELECT created_at, requested AS "requested: sqlx::types::Json<Requested>"
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
                sqlx::query_as!(
                    Row,
                    "SELECT id, name, description, price_amount, price_currency, version,
                            created_at, updated_at
                     FROM products WHERE id = $1",
                    id.0
                )
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
                let row = sqlx::query_as!(
                    Row,
                    "UPDATE products
                     SET name = coalesce($3, name),
                         description = coalesce($4, description),
                         price_amount = coalesce($5, price_amount),
                         price_currency = coalesce($6, price_currency),
                         version = version + 1,
                         updated_at = $7
                     WHERE id = $1 AND version = $2
                     RETURNING id, name, description, price_amount, price_currency, version,
                               created_at, updated_at",
                    id.0,
                    version,
                    change.name,
                    change.description,
                    change.price.map(|price| price.amount),
                    change.price.as_ref().map(|price| price.currency.as_str()),
                    now,
                )
                .fetch_optional(&pool)
                .await?;
                match row {
                    Some(row) => Ok(Changed::Done(row.try_into()?)),
                    None => why_not(&pool, id).await,
                }
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
                let done = sqlx::query!(
                    "DELETE FROM products WHERE id = $1 AND version = $2",
                    id.0,
                    version
                )
                .execute(&pool)
                .await;
                match done {
                    Ok(done) if done.rows_affected() == 1 => Ok(Changed::Done(())),
                    Ok(_) => why_not(&pool, id).await,
                    Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => {
                        Ok(Changed::InUse)
                    }
                    Err(error) => Err(error.into()),
                }
            })
            .await
    }
}

/// Why no row had both the id and the version.
async fn why_not<T>(pool: &sqlx::PgPool, id: ProductId) -> Result<Changed<T>, StoreError> {
    let exists = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM products WHERE id = $1) AS "exists!""#,
        id.0
    )
    .fetch_one(pool)
    .await?;
    Ok(if exists {
        Changed::Stale
    } else {
        Changed::Missing
    })
}
