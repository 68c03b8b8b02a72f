//! A cart: what a buyer means to buy, sale by sale.

use serde::{Deserialize, Serialize};

use super::{
    id::{OrderId, SaleId},
    limits::{BUYER_LIMIT_MAX, CALL_ROUNDS_MAX},
};

/// Sales of one cart: as many rounds as one call may touch.
pub const LINES_MAX: usize = CALL_ROUNDS_MAX;

/// Some units of one sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Of which sale.
    pub sale: SaleId,
    /// Units, 1 … [`BUYER_LIMIT_MAX`].
    pub quantity: u64,
}

/// A line that is being bought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedLine {
    /// What.
    #[serde(flatten)]
    pub line: Line,
    /// The id that its order has, or will have.
    pub order: OrderId,
}

/// Why lines make no cart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CartError {
    /// Out of bounds.
    #[error("a cart holds at most {LINES_MAX} sales")]
    Lines,
    /// Lines of one sale add up to more than anybody may buy.
    #[error("the lines of this sale add up to more than {BUYER_LIMIT_MAX} units")]
    Quantity(usize),
}

/// Puts lines of the same sale together, each where it came first.
///
/// # Errors
/// [`CartError`]; the place of a line is its place in `lines`.
pub fn merge(lines: &[Line]) -> Result<Vec<Line>, CartError> {
    let mut merged: Vec<Line> = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        match merged.iter_mut().find(|known| known.sale == line.sale) {
            Some(known) => {
                known.quantity = known.quantity.saturating_add(line.quantity);
                if known.quantity > BUYER_LIMIT_MAX {
                    return Err(CartError::Quantity(at));
                }
            }
            None => merged.push(*line),
        }
    }
    if merged.len() > LINES_MAX {
        return Err(CartError::Lines);
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn line(sale: u128, quantity: u64) -> Line {
        Line {
            sale: SaleId(Uuid::from_u128(sale)),
            quantity,
        }
    }

    #[test]
    fn lines_of_one_sale_become_one() {
        let merged = merge(&[line(2, 1), line(1, 2), line(2, 3)]);
        assert_eq!(merged, Ok(vec![line(2, 4), line(1, 2)]));
        assert_eq!(merge(&[]), Ok(vec![]));
        let too_much = [line(1, BUYER_LIMIT_MAX), line(2, 1), line(1, 1)];
        assert_eq!(merge(&too_much), Err(CartError::Quantity(2)));
        let sales = |n| (0..n).map(|sale| line(sale as u128, 1)).collect::<Vec<_>>();
        assert!(merge(&sales(LINES_MAX)).is_ok());
        assert_eq!(merge(&sales(LINES_MAX + 1)), Err(CartError::Lines));
    }
}
