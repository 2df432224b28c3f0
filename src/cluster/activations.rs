//! Activations: the calibration text's residual stream at the entry of every layer with experts.
//!
//! Hessians come from the released model, and a token's way through it depends on its own window only. So the text is cut into
//! units of windows. A unit is pushed through the model layer by layer; at the entry of each layer with experts its stream is
//! stored, and from there anybody goes on. A layer's shard puts the units' streams behind each other in the order of the
//! windows and has what a run on one machine has at this point, to the bit, whatever the units were.
//!
//! There is no stage of its own for this: a shard that lacks a unit's stream claims the unit and makes it, as far as
//! it needs it; where others are at it, it waits. A shard that has run a whole layer stores what leaves it, so that the
//! shards of one worker, in order, push the text through the model but once.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use moepack_convert::Model;
use moepack_format::{Error, Result, storage};
use moepack_quant::Isa;
use moepack_verify::forward::{Delta, LayerWeights, MoePass, RoutedSum, Stream, embed, ordered};
use moepack_verify::tokens::Windows;

use crate::cluster::claim::Watch;
use crate::cluster::folder::PlanFolder;
use crate::cluster::who::Who;
use crate::engine::stored;
use crate::stop::Stop;

/// First line of stored activations.
const MAGIC: &str = "moepack.activations/1";
/// How long one who waits sleeps before looking again.
const PAUSE: Duration = Duration::from_millis(500);

/// The units of a text.
pub struct Units<'a> {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Where they are stored.
    pub folder: &'a PlanFolder,
    /// Id of the plan.
    pub plan: &'a str,
    /// The released model.
    pub model: &'a Model,
    /// The whole text.
    pub windows: &'a Windows,
    /// Windows of each unit.
    pub units: Vec<Range<usize>>,
    /// Who claims.
    pub who: &'a Who,
    /// Asked between layers and experts.
    pub stop: &'a Stop,
    /// Told of what is waited for; of nothing when that is over.
    pub waits: &'a (dyn Fn(Option<String>) + Sync),
}

impl Units<'_> {
    /// The stream of the whole text at the entry of a layer with experts.
    ///
    /// # Errors
    /// A unit that cannot be made, stored or read; a requested stop.
    pub fn stream_at(&self, layer: usize) -> Result<Stream> {
        self.make_all(layer)?;
        let mut whole: Option<Stream> = None;
        for unit in 0..self.units.len() {
            let stream = self.load(unit, layer)?;
            match &mut whole {
                Some(whole) => whole.append(stream),
                None => whole = Some(stream),
            }
        }
        whole.ok_or_else(|| Error::bad_data("a calibration text without a window"))
    }

    /// Stores what leaves a layer whose experts have all run, as far as nobody did: the entry of the next layer with
    /// experts.
    ///
    /// # Errors
    /// As [`Units::stream_at`].
    pub fn leave(&self, layer: usize, mut stream: Stream, delta: &Delta) -> Result<()> {
        let Some(next) = self.model.spec().moe_layers().map(|(l, _)| l).find(|l| *l > layer) else {
            return Ok(());
        };
        if self.lacking(next)?.is_empty() {
            return Ok(());
        }
        stream.add(self.isa, delta);
        for l in layer + 1..next {
            self.run_layer(l, self.windows, &mut stream)?;
        }
        for (unit, range) in self.units.iter().enumerate() {
            let n_tokens = self.part(range).tokens.len();
            let first = stream.take_first(n_tokens, range.len());
            self.store(unit, next, &first)?;
        }
        Ok(())
    }

    /// Until every unit is stored at a layer: makes those that nobody makes, waits for the others.
    fn make_all(&self, layer: usize) -> Result<()> {
        let (mut watch, mut waiting) = (Watch::default(), false);
        loop {
            let lacking = self.lacking(layer)?;
            let Some(&first) = lacking.first() else { break };
            if !self.make_one(&lacking, layer, &mut watch)? {
                let holder = Watch::holder(&self.claim(first)).unwrap_or_else(|| "another worker".to_owned());
                (self.waits)(Some(format!("unit {first} at layer {layer}, which {holder} makes")));
                waiting = true;
                std::thread::sleep(PAUSE);
            }
            self.stop.check()?;
        }
        if waiting {
            (self.waits)(None);
        }
        Ok(())
    }

    /// Units that are not stored at a layer.
    fn lacking(&self, layer: usize) -> Result<Vec<usize>> {
        let mut lacking = Vec::new();
        for unit in 0..self.units.len() {
            if !storage::exists(&self.path(unit, layer))? {
                lacking.push(unit);
            }
        }
        Ok(lacking)
    }

    /// Makes the first of these units that is free; says whether one was.
    fn make_one(&self, lacking: &[usize], layer: usize, watch: &mut Watch) -> Result<bool> {
        for &unit in lacking {
            if let Some(claim) = watch.claim(&self.claim(unit), self.who)? {
                self.make(unit, layer)?;
                drop(claim);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Pushes a unit to the entry of a layer, from the last one where it is stored, and stores it on the way.
    fn make(&self, unit: usize, layer: usize) -> Result<()> {
        let range = self.units.get(unit).cloned().unwrap_or_default();
        let windows = self.part(&range);
        let moe = |l: usize| self.model.spec().moe(l).is_some();
        let mut stored = None;
        for l in (0..=layer).filter(|&l| moe(l)) {
            if storage::exists(&self.path(unit, l))? {
                stored = Some(l);
            }
        }
        let mut stream = match stored {
            Some(l) => self.load(unit, l)?,
            None => embed(self.model, &windows)?,
        };
        for l in stored.unwrap_or(0)..=layer {
            self.stop.check()?;
            if moe(l) {
                self.store(unit, l, &stream)?;
            }
            if l < layer {
                self.run_layer(l, &windows, &mut stream)?;
            }
        }
        Ok(())
    }

    /// A layer of the released model.
    fn run_layer(&self, l: usize, windows: &Windows, stream: &mut Stream) -> Result<()> {
        let (isa, model) = (self.isa, self.model);
        let weights = LayerWeights::load(isa, model, l)?;
        weights.attention(windows, stream)?;
        if weights.n_experts() == 0 {
            return weights.dense(stream);
        }
        let pass = MoePass::begin(&weights, &windows.tokens, stream)?;
        let mut sum = RoutedSum::new(&pass);
        let work = |e| {
            self.stop.check()?;
            pass.run_expert(e, &weights.pack_expert(&model.expert(l, e)?.decode(isa)?)?, None)
        };
        ordered(weights.n_experts(), work, |_, output| {
            sum.add(&output);
            Ok(())
        })?;
        let delta = pass.finish(sum)?;
        drop(pass);
        stream.add(isa, &delta);
        Ok(())
    }

    fn part(&self, range: &Range<usize>) -> Windows {
        let lens = self.windows.lens.get(range.clone()).unwrap_or_default().to_vec();
        let first: usize = self.windows.lens.iter().take(range.start).sum();
        let tokens = self.windows.tokens.get(first..first + lens.iter().sum::<usize>()).unwrap_or_default();
        Windows { tokens: tokens.to_vec(), lens }
    }

    fn path(&self, unit: usize, layer: usize) -> PathBuf {
        self.folder.activations().join(format!("unit-{unit:05}.layer-{layer:05}"))
    }

    fn claim(&self, unit: usize) -> PathBuf {
        self.folder.activations().join(format!("unit-{unit:05}.claim"))
    }

    fn head(&self, unit: usize, layer: usize) -> String {
        format!("{MAGIC} {} {unit} {layer}\n", self.plan)
    }

    /// Stores a unit's stream, whole or not at all; what is there has the same bytes and stays.
    fn store(&self, unit: usize, layer: usize, stream: &Stream) -> Result<()> {
        let path = self.path(unit, layer);
        if storage::exists(&path)? {
            return Ok(());
        }
        stored::store(&path, &self.head(unit, layer), stream)
    }

    fn load(&self, unit: usize, layer: usize) -> Result<Stream> {
        let range = self.units.get(unit).cloned().unwrap_or_default();
        let windows = self.part(&range);
        stored::load(&self.path(unit, layer), &self.head(unit, layer), self.model.spec(), &windows)
    }
}

#[cfg(test)]
mod tests {
    use moepack_convert::OpenOptions;

    use super::*;

    fn units<'a>(
        folder: &'a PlanFolder,
        model: &'a Model,
        windows: &'a Windows,
        who: &'a Who,
        stop: &'a Stop,
    ) -> Units<'a> {
        Units {
            isa: Isa::get(),
            folder,
            plan: "0123",
            model,
            windows,
            units: vec![0..1, 1..3, 3..4],
            who,
            stop,
            waits: &|_| (),
        }
    }

    /// Streams at the entry of every layer with experts: of the text as one, and put together of units from the last layer
    /// to the first; then once more, of what each layer leaves to the next.
    fn compare(path: &std::path::Path) -> Option<usize> {
        let model = Model::open(path, &OpenOptions::default()).unwrap();
        let windows = Windows { tokens: (0..70).map(|i| i * 7 % 50).collect(), lens: vec![20, 10, 20, 20] };
        let (root, who, stop) = (tempfile::tempdir().unwrap(), Who::this(), Stop::default());
        let folder = PlanFolder::of(root.path());
        std::fs::create_dir(folder.activations()).unwrap();
        let units = units(&folder, &model, &windows, &who, &stop);
        let layers: Vec<usize> = model.spec().moe_layers().map(|(l, _)| l).collect();
        let (Some(&last), Ok(mut stream)) = (layers.last(), embed(&model, &windows)) else { return None };
        let mut whole = Vec::new();
        for l in 0..=last {
            whole.push(stream.clone());
            units.run_layer(l, &windows, &mut stream).ok()?;
        }
        for &l in layers.iter().rev() {
            assert!(units.stream_at(l).unwrap() == whole[l], "{path:?} layer {l}");
        }
        for pair in layers.windows(2) {
            std::fs::remove_dir_all(folder.activations()).unwrap();
            std::fs::create_dir(folder.activations()).unwrap();
            let (mut stream, weights) =
                (whole[pair[0]].clone(), LayerWeights::load(Isa::get(), &model, pair[0]).unwrap());
            weights.attention(&windows, &mut stream).unwrap();
            let pass = MoePass::begin(&weights, &windows.tokens, &stream).unwrap();
            let mut sum = RoutedSum::new(&pass);
            for e in 0..weights.n_experts() {
                let mlp = weights.pack_expert(&model.expert(pair[0], e).unwrap().decode(Isa::get()).unwrap());
                sum.add(&pass.run_expert(e, &mlp.unwrap(), None).unwrap());
            }
            let delta = pass.finish(sum).unwrap();
            drop(pass);
            units.leave(pair[0], stream, &delta).unwrap();
            assert!((0..3).all(|unit| units.path(unit, pair[1]).exists()));
            assert!(units.stream_at(pair[1]).unwrap() == whole[pair[1]], "{path:?} behind layer {}", pair[0]);
        }
        Some(layers.len())
    }

    #[test]
    fn units_put_together_are_the_whole_in_every_family() {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let random = std::fs::read_dir(fixtures.join("random")).unwrap().map(|e| e.unwrap().path());
        let compared: Vec<usize> = random.filter(|p| p.is_dir()).filter_map(|path| compare(&path)).collect();
        assert!(compared.len() > 40, "only {} families have a forward pass with experts", compared.len());
    }

    #[test]
    fn damaged_activations_are_refused() {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/random/mixtral");
        let model = Model::open(&model, &OpenOptions::default()).unwrap();
        let windows = Windows { tokens: (0..70).map(|i| i * 7 % 50).collect(), lens: vec![20, 10, 20, 20] };
        let (root, who, stop) = (tempfile::tempdir().unwrap(), Who::this(), Stop::default());
        let folder = PlanFolder::of(root.path());
        std::fs::create_dir(folder.activations()).unwrap();
        let units = units(&folder, &model, &windows, &who, &stop);
        let layer = model.spec().moe_layers().next().unwrap().0;
        units.stream_at(layer).unwrap();
        let path = units.path(1, layer);
        let good = std::fs::read(&path).unwrap();
        for at in [3, 30, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(units.stream_at(layer).unwrap_err().kind().exit_code(), 65, "byte {at}");
        }
        std::fs::write(&path, &good[..good.len() / 3]).unwrap();
        assert!(units.stream_at(layer).is_err());
        std::fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(units.stream_at(layer).is_err());
    }
}
