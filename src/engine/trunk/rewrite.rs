//! Trunk files that are damaged, made again. What was released is copied from the checkpoint, which is quick; matrices that are
//! coded, which may take a text through the whole model, are made anew only where their planes are damaged.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::manifest::{Manifest, TrunkEntry};
use moepack_format::{Context, Error, InputFile, Kind, Result, salvage};
use moepack_quant::Planes;

use super::write::{TrunkNote, TrunkWork};
use super::{CodedPiece, Piece, Trunk};

/// Trunk files to be made again, and what is lost of them.
#[derive(Debug, Default)]
pub struct TrunkDamage {
    /// Place among the trunk files, and names of coded matrices whose planes are damaged.
    files: Vec<(usize, BTreeSet<String>)>,
}

impl TrunkDamage {
    /// Coded matrices whose planes are damaged.
    pub fn lost(&self) -> impl Iterator<Item = &String> {
        self.files.iter().flat_map(|(_, lost)| lost)
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The files, and which coded matrices of them are lost.
    pub fn files<'m>(&self, manifest: &'m Manifest) -> impl Iterator<Item = (&'m str, Vec<String>)> {
        let file = |&(i, ref lost): &(usize, BTreeSet<String>)| {
            Some((manifest.trunk.get(i)?.file.as_str(), lost.iter().cloned().collect()))
        };
        self.files.iter().filter_map(file)
    }
}

impl TrunkWork<'_> {
    /// Looks at the files of these names in `self.dir`: which coded matrices of them are lost.
    ///
    /// # Errors
    /// A trunk that is not divided as the checkpoint's would be; a disk that fails.
    pub fn survey(
        &self,
        trunk: &Trunk<'_>,
        manifest: &Manifest,
        damaged: &BTreeSet<String>,
    ) -> Result<TrunkDamage> {
        if trunk.files()?.len() != manifest.trunk.len() || trunk.codecs() != manifest.trunk_codecs {
            return Err(Error::bad_data(
                "the bundle's trunk is another than its recipe makes of this checkpoint",
            ));
        }
        let mut damage = TrunkDamage::default();
        for (i, entry) in manifest.trunk.iter().enumerate().filter(|(_, t)| damaged.contains(&t.file)) {
            let (old, mut lost) = (Old::open(self, trunk, i, entry)?, BTreeSet::new());
            for (piece, matrix) in pieces_of(trunk, i)?.iter().filter_map(|p| Some((p, p.coded.as_ref()?))) {
                if old.planes(piece, matrix)?.is_none() {
                    lost.insert(piece.tensor.name.clone());
                }
            }
            damage.files.push((i, lost));
        }
        Ok(damage)
    }

    /// Makes the files again.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a file that does not come out as it was.
    pub fn rewrite(&self, trunk: &Trunk<'_>, manifest: &Manifest, damage: &TrunkDamage) -> Result<()> {
        let wanted = |piece: &Piece<'_>| damage.lost().any(|name| *name == piece.tensor.name);
        let mut coded = self.create_spool()?;
        if self.learns(trunk) && damage.lost().next().is_some() {
            coded = self.code_learnt(trunk, coded, &wanted, &mut TrunkNote::default())?;
        }
        for &(i, _) in &damage.files {
            let (Some(entry), pieces) = (manifest.trunk.get(i), pieces_of(trunk, i)?) else { continue };
            if !self.learns(trunk) {
                coded = self.code_rounded(pieces, coded, &wanted)?;
            }
            let old = Old::open(self, trunk, i, entry)?;
            for piece in pieces.iter().filter(|piece| !wanted(piece)) {
                let Some(matrix) = &piece.coded else { continue };
                let planes = old.planes(piece, matrix)?;
                let gone = || Error::new(Kind::Io, "damaged meanwhile").in_tensor(&piece.tensor.name);
                coded.append(piece, matrix, &planes.ok_or_else(gone)?)?;
            }
            let sha256 = manifest.file(&entry.file).map(|f| f.sha256.as_str());
            self.write_file(&self.dir.join(&entry.file), pieces, Some(&coded), sha256)?;
        }
        Ok(())
    }
}

fn pieces_of<'t, 'a>(trunk: &'t Trunk<'a>, nth: usize) -> Result<&'t [Piece<'a>]> {
    Ok(trunk.files()?.into_iter().nth(nth).map_or(&[], |range| trunk.pieces(range)))
}

/// A damaged file, if it is there.
struct Old {
    file: Option<InputFile>,
    /// Start, end and checksum of tensors by name.
    places: BTreeMap<String, (u64, u64, u32)>,
}

impl Old {
    fn open(work: &TrunkWork<'_>, trunk: &Trunk<'_>, nth: usize, entry: &TrunkEntry) -> Result<Old> {
        let file = match InputFile::open(&work.dir.join(&entry.file)) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), Kind::Missing | Kind::BadData) => {
                return Ok(Old { file: None, places: BTreeMap::new() });
            }
            Err(e) => return Err(e),
        };
        let found = salvage::trunk(&file)?;
        let specs = pieces_of(trunk, nth)?.iter().flat_map(Piece::specs);
        let places = specs.zip(entry.tensor_crc32cs()).filter_map(|(spec, crc32c)| {
            let &(start, end) = found.get(&spec.name)?;
            Some((spec.name, (start, end, crc32c?)))
        });
        let places = places.collect();
        Ok(Old { file: Some(file), places })
    }

    /// The planes of a matrix, if all of them have their checksums.
    fn planes(&self, piece: &Piece<'_>, matrix: &CodedPiece) -> Result<Option<Planes>> {
        let Some(file) = &self.file else { return Ok(None) };
        let mut planes = Planes::new();
        for spec in piece.specs() {
            let Some(&(start, end, crc32c)) = self.places.get(&spec.name) else { return Ok(None) };
            match salvage::read_if(file, start..end, crc32c)? {
                Some(bytes) => planes.push(bytes),
                None => return Ok(None),
            }
        }
        let specs =
            matrix.codec.planes_of(matrix.rows, matrix.cols, &planes).in_tensor(&piece.tensor.name)?;
        let fits = specs.iter().zip(&planes).all(|(s, p)| s.bytes() == Ok(p.len() as u64));
        Ok((fits && specs.len() == planes.len()).then_some(planes))
    }
}
