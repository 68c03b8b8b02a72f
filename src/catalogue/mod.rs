//! The catalogue, read by a crowd: products and images from memory, then from the cache Redis, then
//! from PostgreSQL.
//!
//! Everything that is held belongs to a generation, which changes in the transaction that changes a
//! product or an image. A node compares once in [`LOOK`] at most; whoever makes a change compares at
//! once. A look comes before whatever is read for it, so nothing old is ever held under a new
//! generation.

mod picture;

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tokio::sync::{OnceCell, Semaphore};
use uuid::Uuid;

pub use self::picture::{MEDIA_TYPES, Painter, PictureError};
use crate::{
    domain::id::ProductId,
    engine::Cache,
    metrics::CatalogueMetrics,
    store::{
        StoreError,
        images::{File, ImageAdded, Images, NewImage},
        products::{Added, Change, Changed, Content, Product, Products, Search},
    },
};

/// How long a node goes on with the generation that it has seen last.
const LOOK: Duration = Duration::from_secs(1);

/// How long a look may take before a node goes on with the generation that it knows.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// How long the cache Redis keeps a page that nobody asks for.
const LIFE: Duration = Duration::from_mins(5);

/// Queries under way at a time: the other connections are for those who buy.
const QUERIES_MAX: usize = 3;

/// Pages and products in memory, and their size in bytes.
const PAGES_MAX: (usize, usize) = (4_096, 32 * 1024 * 1024);

/// Images in memory, and their size in bytes.
const FILES_MAX: (usize, usize) = (1_024, 64 * 1024 * 1024);

type Page = Arc<Vec<Product>>;

/// Products and images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalogue {
    products: Products,
    images: Images,
    cache: Cache,
    held: Arc<Mutex<Held>>,
    /// One looks at the generation, the others wait for what it sees.
    look: Arc<tokio::sync::Mutex<()>>,
    queries: Arc<Semaphore>,
    metrics: CatalogueMetrics,
}

#[derive(Debug)]
struct Held {
    generation: Option<Uuid>,
    looked_at: Option<Instant>,
    /// Changes that this node has made.
    changes: u64,
    pages: Shelf<String, Page>,
    files: Shelf<[u8; 32], Option<Arc<File>>>,
}

/// What is held of one kind. When it is full it is emptied: what is asked for comes back.
#[derive(Debug)]
struct Shelf<K, V> {
    cells: HashMap<K, Arc<OnceCell<V>>>,
    bytes: usize,
    most: (usize, usize),
}

impl<K: Hash + Eq, V> Shelf<K, V> {
    fn new(most: (usize, usize)) -> Self {
        Self {
            cells: HashMap::new(),
            bytes: 0,
            most,
        }
    }

    fn clear(&mut self) {
        self.cells.clear();
        self.bytes = 0;
    }

    fn cell(&mut self, key: K) -> Arc<OnceCell<V>> {
        if self.cells.len() >= self.most.0 && !self.cells.contains_key(&key) {
            self.clear();
        }
        Arc::clone(self.cells.entry(key).or_default())
    }

    fn weigh(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes > self.most.1 {
            self.clear();
        }
    }
}

impl Catalogue {
    /// The catalogue in these tables, with this cache before them.
    pub fn new(
        products: Products,
        images: Images,
        cache: Cache,
        metrics: CatalogueMetrics,
    ) -> Self {
        Self {
            products,
            images,
            cache,
            held: Arc::new(Mutex::new(Held {
                generation: None,
                looked_at: None,
                changes: 0,
                pages: Shelf::new(PAGES_MAX),
                files: Shelf::new(FILES_MAX),
            })),
            look: Arc::default(),
            queries: Arc::new(Semaphore::new(QUERIES_MAX)),
            metrics,
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation that everything shown now belongs to.
    async fn generation(&self) -> Result<Uuid, StoreError> {
        let fresh = || {
            let held = self.held();
            let looked_at = held.looked_at?;
            (looked_at.elapsed() < LOOK).then_some(held.generation)?
        };
        if let Some(generation) = fresh() {
            return Ok(generation);
        }
        let _turn = self.look.lock().await;
        if let Some(generation) = fresh() {
            return Ok(generation);
        }
        let (known, changes) = {
            let held = self.held();
            (held.generation, held.changes)
        };
        let asked_at = Instant::now();
        self.metrics.queries.inc();
        let asked = self.products.generation();
        let seen = match known {
            // A shop window stays lit while PostgreSQL is away.
            Some(known) => match tokio::time::timeout(LOOK_TIMEOUT, asked).await {
                Ok(Ok(seen)) => seen,
                Ok(Err(_)) | Err(_) => known,
            },
            None => asked.await?,
        };
        let mut held = self.held();
        // Without that, a change of this node has come between: the next one looks again.
        if held.changes == changes {
            held.looked_at = Some(asked_at);
            if held.generation != Some(seen) {
                held.generation = Some(seen);
                held.pages.clear();
                held.files.clear();
            }
        }
        Ok(seen)
    }

    /// A change of this node is seen by everybody who asks this node from now on.
    fn changed(&self) {
        let mut held = self.held();
        held.changes += 1;
        held.generation = None;
        held.looked_at = None;
        held.pages.clear();
        held.files.clear();
    }

    /// What is held under `key`, or what `load` brings; of all who ask at once, one loads.
    async fn read<K, V, F>(
        &self,
        key: K,
        shelf: impl Fn(&mut Held) -> &mut Shelf<K, V>,
        weight: impl Fn(&V) -> usize,
        load: impl FnOnce(Uuid) -> F,
    ) -> Result<V, StoreError>
    where
        K: Hash + Eq,
        V: Clone,
        F: Future<Output = Result<V, StoreError>>,
    {
        let generation = self.generation().await?;
        let cell = {
            let mut held = self.held();
            if held.generation == Some(generation) {
                shelf(&mut held).cell(key)
            } else {
                // It has changed since; what belongs to the old one is not held.
                Arc::default()
            }
        };
        let value = cell.get_or_try_init(|| async {
            let value = load(generation).await?;
            let mut held = self.held();
            if held.generation == Some(generation) {
                shelf(&mut held).weigh(weight(&value));
            }
            Ok(value)
        });
        value.await.cloned()
    }

    /// A page that the cache Redis may have, too.
    async fn page<F>(
        &self,
        key: String,
        shared: bool,
        load: impl FnOnce() -> F,
    ) -> Result<Page, StoreError>
    where
        F: Future<Output = Result<Vec<Product>, StoreError>>,
    {
        let name = key.clone();
        let weight = |page: &Page| page.iter().map(size).sum();
        self.read(
            key,
            |held| &mut held.pages,
            weight,
            async |generation| {
                let name = format!("catalogue:{generation}:{name}");
                if shared
                    && let Some(bytes) = self.cache.get(&name).await
                    && let Ok(page) = serde_json::from_slice(&bytes)
                {
                    self.metrics.cached.inc();
                    return Ok(Arc::new(page));
                }
                let page = {
                    let _turn = self.queries.acquire().await;
                    self.metrics.queries.inc();
                    load().await?
                };
                if shared && let Ok(bytes) = serde_json::to_vec(&page) {
                    self.cache.put(&name, bytes.into(), LIFE).await;
                }
                Ok(Arc::new(page))
            },
        )
        .await
    }

    /// The product with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn by_id(&self, id: ProductId) -> Result<Option<Product>, StoreError> {
        let load = async || Ok(self.products.by_id(id).await?.into_iter().collect());
        let page = self.page(format!("product:{id}"), true, load).await?;
        // Whoever could write to the cache must not show one product for another.
        Ok(page.first().filter(|product| product.id == id).cloned())
    }

    /// A page of products.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn search(&self, search: Search) -> Result<Page, StoreError> {
        // Strings and numbers always become JSON.
        let key = serde_json::to_string(&search).unwrap_or_default();
        // What few ask for, or what an instant decides, is not worth the cache's memory.
        let shared = search.words.is_none() && search.on_sale.is_none();
        let load = async || self.products.search(search).await;
        self.page(format!("page:{key}"), shared, load).await
    }

    /// The rendition with this SHA-256.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file(&self, hash: [u8; 32]) -> Result<Option<Arc<File>>, StoreError> {
        let weight = |file: &Option<Arc<File>>| file.as_ref().map_or(64, |file| file.bytes.len());
        self.read(
            hash,
            |held| &mut held.files,
            weight,
            async |_| {
                let _turn = self.queries.acquire().await;
                self.metrics.queries.inc();
                Ok(self.images.file(hash).await?.map(Arc::new))
            },
        )
        .await
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
        let _changed = Changing(self);
        self.products.add(id, content, keyed, now).await
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
        let _changed = Changing(self);
        self.products.change(id, version, change, now).await
    }

    /// Removes the product if it has this version and no sale refers to it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove(&self, id: ProductId, version: i64) -> Result<Changed<()>, StoreError> {
        let _changed = Changing(self);
        self.products.remove(id, version).await
    }

    /// Adds an image behind the product's others.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add_image(
        &self,
        product: ProductId,
        image: NewImage,
        now: DateTime<Utc>,
    ) -> Result<ImageAdded, StoreError> {
        let _changed = Changing(self);
        self.images.add(product, image, now).await
    }

    /// Removes an image of a product; `false` when there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove_image(
        &self,
        product: ProductId,
        image: Uuid,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let _changed = Changing(self);
        self.images.remove(product, image, now).await
    }
}

/// A change under way: whatever comes of it, and when its client leaves, what is held is given up.
struct Changing<'a>(&'a Catalogue);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changed();
    }
}

/// About what a product takes, in bytes.
fn size(product: &Product) -> usize {
    let text = product.content.name.len() + product.content.description.len();
    let renditions = product.images.iter().map(|image| image.renditions.len());
    512 + text + 200 * renditions.sum::<usize>()
}
