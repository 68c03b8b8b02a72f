//! Lists in pages: how far, from where, and how a page says where it ended.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::ToSchema;

use super::problem::Problem;

const LIMIT_MAX: i64 = 100;
const LIMIT_DEFAULT: i64 = 20;

/// Which page.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Entries on a page, 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    pub(super) limit: Option<i64>,
    /// The `next_cursor` of the page before.
    pub(super) cursor: Option<String>,
}

/// Which page of a list: `limit` and `cursor` of its query, understood.
///
/// `C` is the place where a page ends. A list must not change under its cursor: make it of the
/// values that it is sorted by.
#[derive(Debug)]
pub(super) struct Pagination<C> {
    limit: usize,
    /// The place behind which the page begins.
    pub(super) after: Option<C>,
}

impl<C: Serialize + DeserializeOwned> Pagination<C> {
    /// Reads the two members of a query.
    pub(super) fn read(limit: Option<i64>, cursor: Option<&str>) -> Result<Self, Problem> {
        let limit = limit.unwrap_or(LIMIT_DEFAULT);
        let limit = usize::try_from(limit)
            .ok()
            .filter(|_| (1..=LIMIT_MAX).contains(&limit))
            .ok_or_else(|| Problem::unreadable("#/query/limit", "must be 1 to 100"))?;
        let after = match cursor {
            Some(text) => Some(decode(text).ok_or_else(Self::bad_cursor)?),
            None => None,
        };
        Ok(Self { limit, after })
    }

    /// The refusal of a cursor that this list did not give.
    pub(super) fn bad_cursor() -> Problem {
        Problem::unreadable(
            "#/query/cursor",
            "must be a next_cursor of the same list, sorted alike",
        )
    }

    /// How many rows to ask for: one more than the page has, to see whether there is another.
    pub(super) fn rows(&self) -> i64 {
        i64::try_from(self.limit).unwrap_or(LIMIT_MAX) + 1
    }

    /// The page out of [`rows`](Self::rows) rows; `place` says where a row stands.
    pub(super) fn page<R, T>(
        &self,
        mut rows: Vec<R>,
        place: impl Fn(&R) -> C,
        view: impl FnMut(R) -> T,
    ) -> Page<T> {
        let has_more = rows.len() > self.limit;
        rows.truncate(self.limit);
        let next_cursor = rows
            .last()
            .filter(|_| has_more)
            .map(|row| encode(&place(row)));
        Page {
            data: rows.into_iter().map(view).collect(),
            has_more,
            next_cursor,
        }
    }
}

impl<T> Page<T> {
    /// Takes entries out that turned out not to belong to the list; where it goes on stays.
    pub(super) fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.data.retain(keep);
    }
}

impl<T, E> Page<Result<T, E>> {
    /// The page of what could all be read.
    pub(super) fn all(self) -> Result<Page<T>, E> {
        Ok(Page {
            data: self.data.into_iter().collect::<Result<_, _>>()?,
            has_more: self.has_more,
            next_cursor: self.next_cursor,
        })
    }
}

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Page<T> {
    data: Vec<T>,
    /// Whether there is another page.
    has_more: bool,
    /// What gets it, as `cursor`.
    next_cursor: Option<String>,
}

fn encode(place: &impl Serialize) -> String {
    // Places are made of strings and numbers: they always become JSON.
    BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(place).unwrap_or_default())
}

fn decode<C: DeserializeOwned>(text: &str) -> Option<C> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = Pagination<u64>;

    /// The numbers behind `after`, as a store would give them.
    fn rows(pagination: &Numbers) -> Vec<u64> {
        let after = pagination.after.unwrap_or(0);
        (after + 1..=25)
            .take(usize::try_from(pagination.rows()).unwrap())
            .collect()
    }

    #[test]
    fn pages_follow_each_other_without_gap_and_end() {
        let mut cursor = None;
        let mut seen = Vec::new();
        let mut pages = 0;
        loop {
            let pagination = Numbers::read(Some(10), cursor.as_deref()).unwrap();
            let page = pagination.page(rows(&pagination), |row| *row, |row| row);
            pages += 1;
            seen.extend(page.data);
            assert_eq!(page.has_more, page.next_cursor.is_some());
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => break,
            }
        }
        assert_eq!((seen, pages), ((1..=25).collect::<Vec<_>>(), 3));
    }

    #[test]
    fn a_full_last_page_has_no_next_one() {
        let pagination = Numbers::read(Some(25), None).unwrap();
        let page = pagination.page(rows(&pagination), |row| *row, |row| row);
        assert!(!page.has_more && page.next_cursor.is_none() && page.data.len() == 25);
    }

    #[test]
    fn limits_and_cursors_are_validated() {
        assert_eq!(Numbers::read(None, None).unwrap().limit, 20);
        for good in [1, 100] {
            assert!(Numbers::read(Some(good), None).is_ok());
        }
        for bad in [0, -1, 101, 1_000_000_000, i64::MIN, i64::MAX] {
            assert!(Numbers::read(Some(bad), None).is_err(), "{bad}");
        }
        assert_eq!(
            Numbers::read(None, Some(&encode(&7_u64))).unwrap().after,
            Some(7)
        );
        for bad in [
            "",
            "x",
            "!",
            "7",
            &encode(&"seven"),
            &encode(&-7),
            &format!("{}=", encode(&7)),
        ] {
            assert!(Numbers::read(None, Some(bad)).is_err(), "{bad}");
        }
    }
}
