//! Checkpoints through their outer interface; the `safetensors` crate is the judge of the format.

use std::fs;

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::*;
use crate::{
    model::{Gpt2Config, LlamaConfig, MptConfig},
    tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
};

fn llama(tie_word_embeddings: bool) -> Architecture {
    let sizes = LlamaConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        ..LlamaConfig::default()
    };
    Architecture::Llama(LlamaConfig { tie_word_embeddings, ..sizes })
}

fn gpt2() -> Architecture {
    Architecture::Gpt2(Gpt2Config { n_embd: 16, n_layer: 2, ..Gpt2Config::default() })
}

fn mpt() -> Architecture {
    Architecture::Mpt(MptConfig { d_model: 16, n_layers: 2, ..MptConfig::default() })
}

fn write_byte_model(directory: &Path, architecture: &Architecture) -> Vec<f32> {
    let flat = architecture.manifest().initialise(1);
    let metadata = BTreeMap::from([("run".to_owned(), "a".to_owned()), ("round".to_owned(), "7".to_owned())]);
    let tokenizer = byte_tokenizer_json();
    write(directory, architecture, &flat, &tokenizer, BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, &metadata)
        .unwrap();
    flat
}

/// A name and what stands for it: dtype, shape, bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tensors of `architecture`, encoded by `encode`.
fn tensors(architecture: &Architecture, dtype: Dtype, encode: impl Fn(f32) -> Vec<u8>) -> Vec<Tensor> {
    let manifest = architecture.manifest();
    let flat = manifest.initialise(1);
    let mut rest = flat.as_slice();
    let mut tensors = Vec::new();
    for tensor in manifest.tensors() {
        let (values, tail) = rest.split_at(tensor.parameters());
        rest = tail;
        let bytes = values.iter().flat_map(|value| encode(*value)).collect();
        tensors.push((tensor.name.clone(), dtype, tensor.shape.clone(), bytes));
    }
    tensors
}

fn fp32(architecture: &Architecture) -> Vec<Tensor> {
    tensors(architecture, Dtype::F32, |value| value.to_le_bytes().to_vec())
}

/// Reads a checkpoint of `architecture` whose weights are `tensors`, as another program would write them.
fn read_foreign(
    architecture: &Architecture,
    tensors: &[Tensor],
) -> Result<LoadedCheckpoint, CheckpointError> {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("checkpoint");
    write_byte_model(&directory, architecture);
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(directory.join(MODEL_FILE), safetensors::serialize(views, None).unwrap()).unwrap();
    read(&directory)
}

/// The message about the tensors, without the path.
fn refusal(result: Result<LoadedCheckpoint, CheckpointError>) -> String {
    match result.unwrap_err() {
        CheckpointError::Weights { source, .. } => source.to_string(),
        error => panic!("not about the tensors: {error}"),
    }
}

#[test]
fn what_was_written_is_read_back() {
    for architecture in [llama(true), llama(false), gpt2(), mpt()] {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("runs/a/round-7");
        let flat = write_byte_model(&directory, &architecture);
        let expected = LoadedCheckpoint {
            architecture,
            flat,
            tokenizer_json: byte_tokenizer_json(),
            end_of_text: BYTE_END_OF_TEXT.to_owned(),
        };
        assert_eq!(read(&directory).unwrap(), expected);
    }
}

#[test]
fn the_summary_is_the_size_of_the_directory_and_nothing_lies_beside_it() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    let flat = gpt2().manifest().initialise(1);
    let summary = write(&directory, &gpt2(), &flat, "{}", "<end>", 3, &BTreeMap::new()).unwrap();
    let bytes: u64 =
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(summary, CheckpointSummary { bytes });
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn equal_models_are_equal_files() {
    let root = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| root.path().join(name));
    for path in &paths {
        write_byte_model(path, &llama(true));
    }
    for entry in fs::read_dir(&paths[0]).unwrap() {
        let name = entry.unwrap().file_name();
        assert_eq!(
            fs::read(paths[0].join(&name)).unwrap(),
            fs::read(paths[1].join(&name)).unwrap(),
            "{name:?}"
        );
    }
}

#[test]
fn the_weights_are_a_safetensors_file_with_the_names_of_hugging_face() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    let flat = write_byte_model(&directory, &llama(true));
    let file = fs::read(directory.join(MODEL_FILE)).unwrap();
    let (_, header) = SafeTensors::read_metadata(&file).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!((metadata["format"].as_str(), metadata["round"].as_str()), ("pt", "7"));
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!((embedding.dtype(), embedding.shape()), (Dtype::F32, [257, 16].as_slice()));
    assert_eq!(embedding.data(), bytemuck::cast_slice::<f32, u8>(&flat[..257 * 16]));
    assert_eq!(embedding.data().as_ptr().addr() % 8, file.as_ptr().addr() % 8, "the data are aligned");
    assert_eq!(tensors.len(), llama(true).manifest().tensors().len());
}

#[test]
fn a_checkpoint_says_whether_documents_were_kept_apart_unless_it_does_not_know() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("x");
    let flat = llama(true).manifest().initialise(1);
    for (entry, expected) in
        [(Some("true"), Some(true)), (Some("false"), Some(false)), (Some("x"), None), (None, None)]
    {
        let metadata = entry.map(|entry| (DOCUMENT_MASK.to_owned(), entry.to_owned())).into_iter().collect();
        let tokenizer = byte_tokenizer_json();
        let (end, id) = (BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID);
        write(&directory, &llama(true), &flat, &tokenizer, end, id, &metadata).unwrap();
        assert_eq!(CheckpointReader::open(&directory).unwrap().document_mask(), expected);
    }
}

#[test]
fn a_vector_of_another_length_is_refused_and_nothing_is_written() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    let error = write(&directory, &gpt2(), &[0.0; 3], "{}", "<end>", 3, &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::Length { actual: 3, .. }), "{error}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn a_vector_that_ends_early_leaves_the_directory_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    let flat = write_byte_model(&directory, &gpt2());
    let mut values = &bytemuck::cast_slice(&flat)[4..];
    let error = write_from(&directory, &gpt2(), &mut values, "{}", "<end>", 3, &BTreeMap::new()).unwrap_err();
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(read(&directory).unwrap().flat, flat);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing lies beside it");
}

#[test]
fn half_precision_is_widened() {
    let flat = llama(true).manifest().initialise(1);
    let as_bf16 = tensors(&llama(true), Dtype::BF16, |value| bf16::from_f32(value).to_le_bytes().to_vec());
    let expected: Vec<f32> = flat.iter().map(|value| bf16::from_f32(*value).to_f32()).collect();
    assert_eq!(read_foreign(&llama(true), &as_bf16).unwrap().flat, expected);
    let as_f16 = tensors(&llama(true), Dtype::F16, |value| f16::from_f32(value).to_le_bytes().to_vec());
    let expected: Vec<f32> = flat.iter().map(|value| f16::from_f32(*value).to_f32()).collect();
    assert_eq!(read_foreign(&llama(true), &as_f16).unwrap().flat, expected);
}

#[test]
fn tensors_longer_than_a_block_are_read_whole() {
    let config = Gpt2Config { n_embd: 16, n_layer: 1, vocab_size: 40_000, ..Gpt2Config::default() };
    let architecture = Architecture::Gpt2(config);
    let read = read_foreign(&architecture, &fp32(&architecture)).unwrap();
    assert_eq!(read.flat, architecture.manifest().initialise(1));
}

#[test]
fn any_piece_is_filled_as_in_the_whole() {
    let root = tempfile::tempdir().unwrap();
    let flat = write_byte_model(root.path(), &gpt2());
    let reader = CheckpointReader::open(root.path()).unwrap();
    for length in [0, 1, 3, 250, 4096, flat.len()] {
        for start in (0..=flat.len() - length).step_by(997) {
            let mut piece = vec![f32::NAN; length];
            reader.fill(start as u64, &mut piece).unwrap();
            assert_eq!(piece, flat[start..start + length], "{length} values from {start}");
        }
    }
    let error = reader.fill(1, &mut vec![0.0; flat.len()]).unwrap_err();
    assert!(matches!(error, CheckpointError::Length { .. }), "{error}");
}

/// Writes a checkpoint of `gpt2()` whose tensors are spread over files with these names, in turn.
fn write_sharded(directory: &Path, names: &[&str]) -> Vec<f32> {
    let flat = write_byte_model(directory, &gpt2());
    fs::remove_file(directory.join(MODEL_FILE)).unwrap();
    let tensors = fp32(&gpt2());
    let mut weight_map = serde_json::Map::new();
    for (index, file) in names.iter().enumerate() {
        let part = tensors.iter().skip(index).step_by(names.len());
        weight_map.extend(part.clone().map(|(name, ..)| (name.clone(), (*file).into())));
        let views = part.map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        if let Some(name) = Path::new(file).file_name() {
            fs::write(directory.join(name), safetensors::serialize(views, None).unwrap()).unwrap();
        }
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(directory.join(weights::INDEX_FILE), index.to_string()).unwrap();
    flat
}

#[test]
fn weights_in_several_files_are_read_as_one() {
    let root = tempfile::tempdir().unwrap();
    let names = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "c.safetensors"];
    let flat = write_sharded(root.path(), &names);
    assert_eq!(read(root.path()).unwrap().flat, flat);

    let error = refusal(read_with(root.path(), |path| fs::copy(path.join(names[0]), path.join(names[2]))));
    assert!(
        error.contains("transformer.wte.weight is there twice (also as transformer.wte.weight)"),
        "{error}"
    );
    assert!(error.contains("transformer.h.0.ln_1.weight is missing"), "{error}");
    let error = read_with(root.path(), |path| fs::remove_file(path.join(names[1]))).unwrap_err().to_string();
    assert!(error.contains("cannot open") && error.contains(names[1]), "{error}");
}

/// What reading gives after `damage` was done.
fn read_with<T>(
    directory: &Path,
    damage: impl FnOnce(&Path) -> io::Result<T>,
) -> Result<LoadedCheckpoint, CheckpointError> {
    damage(directory).unwrap();
    read(directory)
}

#[test]
fn an_index_names_files_beside_it_only() {
    for name in ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""] {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("checkpoint");
        write_sharded(&directory, &["x.safetensors", name]);
        let error = refusal(read(&directory));
        assert!(error.contains("which is not in the checkpoint's directory"), "{name}: {error}");
    }
    let root = tempfile::tempdir().unwrap();
    write_sharded(root.path(), &["x.safetensors"]);
    fs::write(root.path().join(weights::INDEX_FILE), r#"{"weight_map": {}}"#).unwrap();
    assert!(refusal(read(root.path())).contains("it names 0 files"));
    fs::write(root.path().join(weights::INDEX_FILE), r#"{"weights": {}}"#).unwrap();
    assert!(matches!(read(root.path()), Err(CheckpointError::Json { .. })));
}

#[test]
fn a_bare_model_is_read_without_its_prefix_and_with_what_older_files_hold() {
    for (architecture, buffer) in
        [(llama(true), "layers.0.self_attn.rotary_emb.inv_freq"), (gpt2(), "h.1.attn.bias"), (mpt(), "")]
    {
        let mut tensors = fp32(&architecture);
        for (name, ..) in &mut tensors {
            *name = name.trim_start_matches("transformer.").trim_start_matches("model.").to_owned();
        }
        if !buffer.is_empty() {
            tensors.push((buffer.to_owned(), Dtype::F32, vec![1], vec![0; 4]));
        }
        let flat = architecture.manifest().initialise(1);
        assert_eq!(read_foreign(&architecture, &tensors).unwrap().flat, flat);
        tensors.push(("layers.0.other".to_owned(), Dtype::F32, vec![1], vec![0; 4]));
        assert!(refusal(read_foreign(&architecture, &tensors)).contains("layers.0.other is not expected"));
    }
}

#[test]
fn gpt2_is_read_without_its_prefix_and_with_its_masks() {
    let mut tensors = fp32(&gpt2());
    for (name, ..) in &mut tensors {
        *name = name.trim_start_matches("transformer.").to_owned();
    }
    tensors.push(("h.0.attn.bias".to_owned(), Dtype::U8, vec![1, 1, 4, 4], vec![1; 16]));
    tensors.push(("h.0.attn.masked_bias".to_owned(), Dtype::F32, vec![], vec![0; 4]));
    tensors.push(("lm_head.weight".to_owned(), Dtype::F32, vec![1], vec![0; 4]));
    assert_eq!(read_foreign(&gpt2(), &tensors).unwrap().flat, gpt2().manifest().initialise(1));
}

#[test]
fn every_tensor_that_does_not_match_is_named() {
    let mut tensors = fp32(&llama(false));
    tensors.retain(|(name, ..)| name != "lm_head.weight" && name != "model.norm.weight");
    let (_, _, shape, _) =
        tensors.iter_mut().find(|(name, ..)| name.ends_with("0.mlp.up_proj.weight")).unwrap();
    shape.reverse();
    tensors.push(("model.layers.0.self_attn.q_proj.bias".to_owned(), Dtype::F32, vec![1], vec![0; 4]));
    let (_, dtype, ..) =
        tensors.iter_mut().find(|(name, ..)| name.ends_with("1.input_layernorm.weight")).unwrap();
    *dtype = Dtype::I32;
    assert_eq!(
        refusal(read_foreign(&llama(false), &tensors)),
        "does not hold the tensors of config.json: \
         model.layers.0.mlp.up_proj.weight has the shape [16, 24], not [24, 16]; \
         model.layers.1.input_layernorm.weight is I32; supported: F32, BF16, F16; \
         model.norm.weight is missing; lm_head.weight is missing; \
         model.layers.0.self_attn.q_proj.bias is not expected"
    );
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut tensors = fp32(&gpt2());
    tensors[1].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_eq!(
        refusal(read_foreign(&gpt2(), &tensors)),
        "tensor transformer.wpe.weight holds NaN or infinite values"
    );
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    write_byte_model(&directory, &gpt2());
    let whole = fs::read(directory.join(MODEL_FILE)).unwrap();
    for length in [0, 7, 8, 100, 1_000, whole.len() - 1] {
        fs::write(directory.join(MODEL_FILE), &whole[..length]).unwrap();
        assert!(matches!(read(&directory), Err(CheckpointError::Weights { .. })), "{length} bytes");
    }
    let huge = [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat();
    fs::write(directory.join(MODEL_FILE), huge).unwrap();
    assert!(refusal(read(&directory)).contains("announces a header of 18446744073709551615 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A size that was made up must not be what is allocated.
    #[test]
    fn a_damaged_checkpoint_is_refused_or_a_whole_model(
        file in prop::sample::select(vec![CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]),
        place in any::<prop::sample::Index>(),
        instead in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..9),
            prop::sample::select(vec![&b"9"[..], b"99999999999", b"-", b"null", b"[[[[[[", b"1e300"])
                .prop_map(<[u8]>::to_vec),
        ],
        replaced in 0usize..9,
    ) {
        static ORIGINAL: std::sync::LazyLock<tempfile::TempDir> = std::sync::LazyLock::new(|| {
            let root = tempfile::tempdir().unwrap();
            write_byte_model(&root.path().join("checkpoint"), &llama(true));
            root
        });
        let root = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(ORIGINAL.path().join("checkpoint")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), root.path().join(entry.file_name())).unwrap();
        }
        let path = root.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        // Where the structure is; the rest of the weights are numbers.
        let place = place.index(bytes.len().min(3_000));
        bytes.splice(place..(place + replaced).min(bytes.len()), instead);
        fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = read(root.path()) {
            prop_assert_eq!(checkpoint.flat.len() as u64, checkpoint.architecture.manifest().parameters());
            prop_assert!(checkpoint.flat.iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn other_formats_are_told_apart_from_missing_files() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    write_byte_model(&directory, &gpt2());
    fs::remove_file(directory.join(MODEL_FILE)).unwrap();
    let error = read(&directory).unwrap_err().to_string();
    assert!(error.contains("cannot open") && error.contains("model.safetensors"), "{error}");
    fs::write(directory.join("pytorch_model.bin"), "").unwrap();
    assert!(matches!(read(&directory), Err(CheckpointError::OtherFormat { .. })));
    fs::remove_file(directory.join(TOKENIZER_FILE)).unwrap();
    assert!(read(&directory).unwrap_err().to_string().contains("holds no tokenizer.json"));
}

#[test]
fn the_end_of_text_is_found_wherever_it_is_named() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("round-1");
    write_byte_model(&directory, &gpt2());
    fs::write(directory.join(TOKENIZER_CONFIG_FILE), r#"{"eos_token": {"content": "<object>"}}"#).unwrap();
    assert_eq!(read(&directory).unwrap().end_of_text, "<object>");
    fs::write(directory.join(TOKENIZER_CONFIG_FILE), r#"{"eos_token": null}"#).unwrap();
    fs::write(directory.join(SPECIAL_TOKENS_FILE), r#"{"eos_token": "<map>"}"#).unwrap();
    assert_eq!(read(&directory).unwrap().end_of_text, "<map>");
    fs::remove_file(directory.join(TOKENIZER_CONFIG_FILE)).unwrap();
    fs::remove_file(directory.join(SPECIAL_TOKENS_FILE)).unwrap();
    assert_eq!(read(&directory).unwrap().end_of_text, BYTE_END_OF_TEXT, "by its id");
    fs::write(directory.join(GENERATION_CONFIG_FILE), r#"{"eos_token_id": [65, 256]}"#).unwrap();
    assert_eq!(read(&directory).unwrap().end_of_text, "A", "the first of several");
    fs::remove_file(directory.join(GENERATION_CONFIG_FILE)).unwrap();
    assert_eq!(read(&directory).unwrap().end_of_text, BYTE_END_OF_TEXT, "by the model's configuration");
    fs::write(directory.join(TOKENIZER_FILE), "{}").unwrap();
    assert!(matches!(read(&directory), Err(CheckpointError::EndOfText { .. })));
}
