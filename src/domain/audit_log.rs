//! The chain of the audit log: what each row proves about the one before it.

use sha2::{Digest, Sha256};

/// SHA-256 over a row and everything before it.
pub type Hash = [u8; 32];

/// A place in the chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// 1, 2, 3 …; 0 before the first row.
    pub number: u64,
    /// The hash of the row there.
    pub hash: Hash,
}

impl Link {
    /// The place of the next row, which says `content`.
    #[must_use]
    pub fn next(&self, content: &str) -> Self {
        let number = self.number + 1;
        Self {
            number,
            hash: hash(&self.hash, number, content),
        }
    }
}

/// The content comes last and the rest has a fixed length: no two rows share their bytes.
fn hash(previous: &Hash, number: u64, content: &str) -> Hash {
    let digest = Sha256::new()
        .chain_update(previous)
        .chain_update(number.to_be_bytes())
        .chain_update(content);
    digest.finalize().into()
}

/// A row that has its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chained {
    /// The row's id in PostgreSQL, which is not its place.
    pub id: i64,
    /// Its place.
    pub link: Link,
    /// The hash of the row before, as this one has it.
    pub previous: Hash,
    /// Everything else that the row says.
    pub content: String,
}

/// The first thing that is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Places without a row.
    #[error("rows {from} to {to} are missing: they were removed")]
    Removed {
        /// The first.
        from: u64,
        /// The last.
        to: u64,
    },
    /// A row says something else than its hash.
    #[error("row {number} (id {id}) was changed")]
    Changed {
        /// Its place.
        number: u64,
        /// Its id.
        id: i64,
    },
    /// A row has another predecessor than the one that stands before it.
    #[error(
        "row {number} (id {id}) does not follow the row before it: it was inserted or moved, or the \
         row before it was replaced"
    )]
    Misplaced {
        /// Its place.
        number: u64,
        /// Its id.
        id: i64,
    },
    /// A row stands behind the end of the chain.
    #[error("row {number} (id {id}) stands behind the end of the chain: it was inserted")]
    Beyond {
        /// Its place.
        number: u64,
        /// Its id.
        id: i64,
    },
    /// The end of the chain is not what was noted as its end.
    #[error("row {number} is whole, but is not the one that was noted there")]
    OtherHead {
        /// Its place.
        number: u64,
    },
}

/// Goes along a chain from its first row.
#[derive(Clone, Copy, Debug)]
pub struct Verifier {
    at: Link,
    head: Link,
}

impl Verifier {
    /// Before the first row of a chain that is said to end at `head`.
    pub fn new(head: Link) -> Self {
        Self {
            at: Link::default(),
            head,
        }
    }

    /// The last row that was found whole.
    pub fn at(&self) -> Link {
        self.at
    }

    /// Looks at the next row in order of their places.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn next(&mut self, row: &Chained) -> Result<(), Broken> {
        let (number, id) = (row.link.number, row.id);
        if number > self.head.number {
            // What is missing before it is the nearer one.
            self.end()?;
            return Err(Broken::Beyond { number, id });
        }
        if number != self.at.number + 1 {
            return Err(Broken::Removed {
                from: self.at.number + 1,
                to: number - 1,
            });
        }
        if hash(&row.previous, number, &row.content) != row.link.hash {
            return Err(Broken::Changed { number, id });
        }
        if row.previous != self.at.hash {
            return Err(Broken::Misplaced { number, id });
        }
        self.at = row.link;
        Ok(())
    }

    /// There is no further row.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn end(&self) -> Result<(), Broken> {
        if self.at.number < self.head.number {
            return Err(Broken::Removed {
                from: self.at.number + 1,
                to: self.head.number,
            });
        }
        if self.at != self.head {
            return Err(Broken::OtherHead {
                number: self.at.number,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> Vec<Chained> {
        let mut at = Link::default();
        (0..6)
            .map(|id| {
                let (content, previous) = (format!("row {id}"), at.hash);
                at = at.next(&content);
                Chained {
                    id,
                    link: at,
                    previous,
                    content,
                }
            })
            .collect()
    }

    fn verified(rows: &[Chained]) -> Result<(), Broken> {
        let head = chain()[5].link;
        let mut verifier = Verifier::new(head);
        for row in rows {
            verifier.next(row)?;
        }
        verifier.end()
    }

    #[test]
    fn every_way_to_tamper_names_its_first_row() {
        let whole = chain();
        assert_eq!(verified(&whole), Ok(()));

        let mut changed = chain();
        changed[2].content.push('!');
        assert_eq!(
            verified(&changed),
            Err(Broken::Changed { number: 3, id: 2 })
        );

        // Its hash made to fit, too: the next one tells.
        changed[2].link = changed[1].link.next(&changed[2].content);
        assert_eq!(
            verified(&changed),
            Err(Broken::Misplaced { number: 4, id: 3 })
        );

        let mut removed = chain();
        removed.drain(2..4);
        assert_eq!(verified(&removed), Err(Broken::Removed { from: 3, to: 4 }));
        assert_eq!(
            verified(&whole[..4]),
            Err(Broken::Removed { from: 5, to: 6 })
        );
        assert_eq!(verified(&[]), Err(Broken::Removed { from: 1, to: 6 }));

        // Two change places, each with what it says of its predecessor, and without.
        let mut moved = chain();
        moved.swap(2, 3);
        (moved[2].link.number, moved[3].link.number) = (3, 4);
        assert_eq!(verified(&moved), Err(Broken::Changed { number: 3, id: 3 }));
        moved[2].link.hash = hash(&moved[2].previous, 3, &moved[2].content);
        assert_eq!(
            verified(&moved),
            Err(Broken::Misplaced { number: 3, id: 3 })
        );

        let mut beyond = chain();
        let link = beyond[5].link.next("more");
        beyond.push(Chained {
            id: 9,
            link,
            previous: beyond[5].link.hash,
            content: "more".to_owned(),
        });
        assert_eq!(verified(&beyond), Err(Broken::Beyond { number: 7, id: 9 }));

        // All made anew with other content: only a head that was noted elsewhere tells.
        let mut anew = chain();
        let mut at = Link::default();
        for row in &mut anew {
            row.content.push('!');
            row.previous = at.hash;
            at = at.next(&row.content);
            row.link = at;
        }
        assert_eq!(verified(&anew), Err(Broken::OtherHead { number: 6 }));
    }
}
